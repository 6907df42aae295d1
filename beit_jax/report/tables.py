"""Tables of runs, side by side."""

import statistics
import sys
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from beit_jax.report.runs import Run

# What a stage is judged by: metric, name for a person, format.
RESULTS = {
    "dvae": (
        ("reconstruction", "reconstruction (nats/value)", "{:.3f}"),
        ("squared_error", "squared error", "{:.4f}"),
        ("usage", "codes used", "{:.0%}"),
        ("perplexity", "perplexity", "{:.1f}"),
    ),
    "vqkd": (
        ("imitation", "1 - cosine to the teacher", "{:.3f}"),
        ("commitment", "commitment", "{:.4f}"),
        ("usage", "codes used", "{:.0%}"),
        ("perplexity", "perplexity", "{:.1f}"),
    ),
    "pixel_decoder": (
        ("loss", "reconstruction (nats/value)", "{:.3f}"),
        ("squared_error", "squared error", "{:.4f}"),
    ),
    "mim": (
        ("loss", "loss", "{:.3f}"),
        ("accuracy", "masked-token accuracy", "{:.1%}"),
        ("guess_accuracy", "commonest token", "{:.1%}"),
        ("evidence_bound", "evidence bound (nats/image)", "{:.1f}"),
    ),
    "classify": (
        ("accuracy", "accuracy", "{:.1%}"),
        ("top5_accuracy", "top-5", "{:.1%}"),
        ("loss", "loss", "{:.3f}"),
    ),
    "probe": (("probe", "accuracy", "{:.1%}"), ("probe_learning_rate", "learning rate", "{:.3g}")),
    "segment": (
        ("mIoU", "mIoU", "{:.1%}"),
        ("mAcc", "mAcc", "{:.1%}"),
        ("aAcc", "pixel accuracy", "{:.1%}"),
    ),
}


class Table(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def make_tables(runs: list[Run]) -> list[Table]:
    """The tables that these runs have something to say for."""
    return [t for t in (stages(runs), features(runs), few_labels(runs)) if t.rows]


def stages(runs: list[Run]) -> Table:
    """One row a run: its size, time and results."""
    rows = []
    for run in runs:
        scores = run.last()
        results = [
            f"{name} {form.format(scores[key])}"
            for key, name, form in RESULTS[run.config["task"]]
            if scores.get(key) is not None
        ]
        rows.append(
            (
                run.name,
                run.config["task"],
                f"{run.updates:,}",
                f"{run.seconds:.0f} s",
                scores.get("split", "-"),
                ", ".join(results) or "-",
            )
        )
    return Table("Stages", ("run", "task", "updates", "time", "split", "result"), rows)


def features(runs: list[Run]) -> Table:
    """What frozen features are worth, beside raw pixels; mean over runs of one name."""
    found: dict[str, list[dict]] = {}
    for run in runs:
        scores = run.last()
        if any(name in scores for name in NAMES):
            who = "encoder, pre-trained" if run.updates else "encoder, random weights"
            who = "frozen encoder" if run.config["task"] == "probe" else who
            found.setdefault(f"{who} ({run.name})", []).append(scores)
    rows = [(who, *(_feature(scores, name) for name in NAMES)) for who, scores in found.items()]
    pixels = {
        name: {s[f"pixel_{name}"] for scores in found.values() for s in scores if _has(s, name)}
        for name in NAMES
    }
    if any(pixels.values()):
        rows.append(("raw pixels", *(_spread(sorted(values)) for values in pixels.values())))
    return Table("Frozen features, accuracy", ("features", "k-NN", "linear probe"), rows)


NAMES = ("knn", "probe")


def _has(scores: dict, name: str) -> bool:
    return scores.get(f"pixel_{name}") is not None


def _feature(runs: list[dict], name: str) -> str:
    values = [scores[name] for scores in runs if scores.get(name) is not None]
    if len(values) != 1:
        return _spread(values)
    (scores,) = (scores for scores in runs if scores.get(name) is not None)
    pooling = "CLS" if scores[f"{name}_from_cls"] else "mean"
    if pooling == "CLS" and scores.get(f"{name}_from_mean"):
        pooling = "CLS and mean"
    return f"{_percent(values[0])} (block {scores[f'{name}_block'] + 1:.0f}, {pooling})"


def few_labels(runs: list[Run]) -> Table:
    """Accuracy by labels a class, from pre-training and from scratch; mean over runs alike."""
    found: dict[int, dict[bool, list[float]]] = {}
    for run in runs:
        if run.config["task"] == "classify" and run.last():
            labels = run.config["data"]["labels_per_class"]
            start = found.setdefault(labels, {True: [], False: []})
            start[bool(run.config["init"]["path"])].append(run.last()["accuracy"])
    rows = [
        (str(labels) if labels else "all", *(_spread(start[way]) for way in (False, True)))
        for labels, start in sorted(found.items())
    ]
    header = ("labels a class", "from scratch", "from pre-training")
    return Table("Fine-tuning, accuracy", header, rows)


def verdicts(runs: list[Run]) -> Table:
    """How each run is doing, by what, and what to try."""
    rows = [(run.name, *verdict) for run in runs for verdict in run.health]
    return Table("Health", ("run", "verdict", "evidence", "what to try"), rows)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = _percent(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.1f} ({len(values)} runs)"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def print_tables(tables: list[Table]) -> None:
    """Prints the tables on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        shown = RichTable(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
