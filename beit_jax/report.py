"""Tables and pictures of runs, side by side: on the terminal, and as one self-contained page.

python -m beit_jax.report runs/digits_dvae runs/digits_mim --output=report.html
"""

import base64
import html
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from beit_jax import command_line, metrics
from beit_jax.errors import UserError
from beit_jax.stored_config import read_config

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

# What the rows of a picture are, by its name and the run's task.
ROWS = {
    ("reconstruction", "dvae"): "held-out images, and what became of them by way of their tokens",
    ("reconstruction", "pixel_decoder"): "held-out images, and their tokens decoded",
    (
        "reconstruction",
        "mim",
    ): "held-out images, masked, decoded from their own tokens, and decoded "
    "with the masked tokens predicted",
    ("codes", "vqkd"): "the commonest codes: where in images each stands (white: most often), and "
    "patches that get it, amid their neighbours",
}
ROWS["codes", "pixel_decoder"] = ROWS["codes", "vqkd"]


class Run(NamedTuple):
    """What a run's folder says."""

    name: str
    config: dict
    lines: list[dict]
    pictures: dict[str, Path]  # the newest of each name

    def last(self, split: str | None = None) -> dict:
        """The last evaluation, of `split` where given; empty if there is none."""
        splits = {split} if split else {line["split"] for line in self.lines} - {"train", "timing"}
        return next((line for line in reversed(self.lines) if line["split"] in splits), {})

    @property
    def updates(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """Time in training and evaluation, compilation included."""
        timings = [line for line in self.lines if line["split"] == "timing"]
        trained = sum(line.get("train_seconds", 0) for line in timings)
        return trained or sum(line.get("eval_seconds", 0) for line in timings)


class Table(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def read_run(folder: str) -> Run:
    """Reads a run's folder; UserError if it is none."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not (path / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is no run: config.json or metrics.jsonl is missing in it.")
    pictures = sorted((path / "pictures").glob("*.png"), key=lambda p: p.stat().st_mtime)
    newest = {picture.stem.rpartition("_")[0]: picture for picture in pictures}
    return Run(path.name, read_config(path), metrics.read(path), newest)


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


def page(runs: list[Run], tables: list[Table]) -> str:
    """One HTML page that needs no other file."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>beit_jax report</title>",
        "<style>body{font:15px system-ui;margin:2em auto;max-width:70em;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;text-align:left;"
        "border-bottom:1px solid #ccc}td:nth-child(4){white-space:nowrap}img{max-width:100%}"
        "pre{background:#f4f4f4;padding:1em;overflow:auto}</style><h1>beit_jax report</h1>",
    ]
    for table in tables:
        rows = "".join(_row(row, "td") for row in table.rows)
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts.append(f"<table>{_row(table.header, 'th')}{rows}</table>")
    for run in runs:
        parts.append(f"<h2>{html.escape(run.name)}</h2>")
        for name, picture in run.pictures.items():
            data = base64.b64encode(picture.read_bytes()).decode()
            rows = ROWS.get((name, run.config["task"]))
            about = f"Rows: {rows}." if rows else name
            parts.append(f"<p>{about}</p><img alt='{about}' src='data:image/png;base64,{data}'>")
        config = html.escape(json.dumps(run.config, indent=2))
        parts.append(f"<details><summary>config</summary><pre>{config}</pre></details>")
    return "\n".join(parts)


def _row(cells: tuple[str, ...], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser, _ = command_line.make_parser("beit_jax.report", *__doc__.split("\n", 1))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", metavar="FILE", help="also write a page, such as report.html")

    def command() -> int:
        args = parser.parse_args(argv)
        runs = [read_run(folder) for folder in args.runs]
        tables = make_tables(runs)
        print_tables(tables)
        if args.output:
            try:
                Path(args.output).write_text(page(runs, tables))
            except OSError as error:
                raise UserError(f"--output={args.output}: {error.strerror}") from error
            print(f"wrote {args.output}")
        return 0

    return command_line.run("beit_jax.report", command, "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
