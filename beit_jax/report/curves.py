"""Which curves of runs are drawn, and what a person calls them."""

from typing import NamedTuple

from beit_jax import references
from beit_jax.report.runs import Run
from beit_jax.report.svg import Bucket, Chart, Series, buckets

TRAIN, TIMING, EVALUATION = "train", "timing", ""


class Curve(NamedTuple):
    """A metric in the lines of a split; EVALUATION is that of most of a run's evaluations."""

    metric: str
    split: str
    label: str
    style: str = "line"


class Kind(NamedTuple):
    """A chart that every run with such metrics gets."""

    title: str
    curves: tuple[Curve, ...]
    percent: bool = False
    may_be_log: bool = False


def _both(title: str, metric: str, **how) -> Kind:
    """Of training, and of evaluations."""
    evaluated = Curve(metric, EVALUATION, "evaluation", "dots")
    return Kind(title, (Curve(metric, TRAIN, "training"), evaluated), **how)


KINDS = (
    _both("Loss", "loss"),
    _both("Accuracy", "accuracy", percent=True),
    _both("Reconstruction, nats a value", "reconstruction"),
    _both("1 - cosine to the teacher", "imitation"),
    _both("Mean IoU", "mIoU", percent=True),
    Kind(
        "k-NN and linear probe on frozen features",
        (
            Curve("knn", EVALUATION, "k-NN", "dots"),
            Curve("probe", EVALUATION, "probe", "dots hollow"),
        ),
        percent=True,
    ),
    _both("Codes in use", "usage", percent=True),
    _both("Perplexity of the codes", "perplexity"),
    Kind("Learning rate", (Curve("lr", TRAIN, "training"),)),
    Kind("Gradient norm", (Curve("grad_norm", TRAIN, "training"),), may_be_log=True),
    Kind("Images a second", (Curve("images_per_second", TIMING, "training"),)),
    Kind("Time spent waiting for data", (Curve("data_wait_share", TIMING, ""),), percent=True),
)
BASELINE = "always the commonest"  # what a guess would score
REFERENCE = "like runs of ours"


def charts(runs: list[tuple[int, Run]]) -> list[Chart]:
    """The charts that (number, run) of one task have something to show in."""
    found = [_chart(kind, runs) for kind in KINDS]
    return [
        chart for chart in found if any(len({b.x for b in s.buckets}) > 1 for s in chart.series)
    ]


def _chart(kind: Kind, runs: list[tuple[int, Run]]) -> Chart:
    series = []
    for number, run in runs:
        named = f"{run.name}, " if len(runs) > 1 else ""
        found = [
            (curve.label, run.points(curve.metric, curve.split or run.watched), curve.style)
            for curve in kind.curves
        ]
        if kind.title == "Accuracy":
            found.append((BASELINE, guesses(run), "baseline"))
        series += [
            Series(f"{named}{label}".strip(", "), buckets(points), style, number)
            for label, points, style in found
            if points
        ]
    return Chart(kind.title, (*series, *_references(kind, runs)), kind.percent, kind.may_be_log)


def _references(kind: Kind, runs: list[tuple[int, Run]]) -> list[Series]:
    """The bundled curves of runs like these, each once."""
    metrics, found = {curve.metric for curve in kind.curves}, {}
    for number, run in runs:
        batch = run.config["train"]["batch_size"]
        for reference in references.alike(run.config):
            points = reference["points"]
            if len(points) > 1:
                spread = [
                    Bucket(images // batch, (low + high) / 2, low, high)
                    for images, low, high in points
                ]
                made = Series(REFERENCE, spread, "reference", number)
            else:  # published, of the end of a run
                value = points[0][1]
                ends = buckets([(1, value), (run.updates, value)])
                made = Series(reference["name"], ends, "baseline", number)
            if reference["metric"] in metrics:
                found.setdefault(reference["name"], made)
    return list(found.values())


def guesses(run: Run) -> list[tuple[int, float | None]]:
    """What guessing scores over the updates: of tokens as logged, of classes one in as many."""
    if run.classes and run.updates:
        return [(step, 1 / run.classes) for step in (1, run.updates)]
    return run.points("guess_accuracy", TRAIN)
