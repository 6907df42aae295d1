"""What a run's folder says of the run."""

from pathlib import Path
from typing import NamedTuple

from beit_jax import class_names, environment, health, metrics
from beit_jax.errors import UserError
from beit_jax.stored_config import read_config


class Run(NamedTuple):
    """What a run's folder says."""

    name: str
    config: dict
    lines: list[dict]
    pictures: dict[str, Path] = {}  # the newest of each name
    starts: list[dict] = []  # environment.jsonl: where and with what each start ran
    classes: int = 0  # that its head tells apart; 0: no such head
    folder: Path = Path()

    @property
    def task(self) -> str:
        return self.config["task"]

    def last(self) -> dict:
        """The last evaluation; empty if there is none."""
        return next(reversed(self.evaluations), {})

    @property
    def evaluations(self) -> list[dict]:
        """The lines that are no training's."""
        return [line for line in self.lines if line["split"] not in metrics.NOT_EVALUATIONS]

    def points(self, name: str, split: str) -> list[tuple[int, float | None]]:
        """(update, value) of a metric in the lines of a split; None: the number did not exist."""
        return [
            (line["step"], line[name])
            for line in self.lines
            if line["split"] == split and name in line
        ]

    @property
    def watched(self) -> str:
        """The split of most evaluations, and of the first where there are as many of another."""
        splits = [line["split"] for line in self.evaluations]
        return max(dict.fromkeys(splits), key=splits.count, default="")

    @property
    def health(self) -> list[health.Verdict]:
        return health.judge(self.config, self.lines, self.classes)

    @property
    def updates(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """Time in training and evaluation, compilation included."""
        timings = [line for line in self.lines if line["split"] == "timing"]
        trained = sum(line.get("train_seconds", 0) for line in timings)
        return trained or sum(line.get("eval_seconds", 0) for line in timings)

    @property
    def device_hours(self) -> float | None:
        """Hours of training times its devices; None for a run that is older than their count."""
        spent = [line for line in self.lines if "train_seconds" in line]
        if not spent or not all("devices" in line for line in spent):
            return None
        return sum(line["train_seconds"] * line["devices"] for line in spent) / 3600


def read_run(folder: str) -> Run:
    """Reads a run's folder; UserError if it is none."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not (path / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is no run: config.json or metrics.jsonl is missing in it.")
    pictures = sorted((path / "pictures").glob("*.png"), key=lambda p: p.stat().st_mtime)
    return Run(
        name=path.resolve().name,
        config=read_config(path),
        lines=metrics.read(path),
        pictures={picture.stem.rpartition("_")[0]: picture for picture in pictures},
        starts=environment.read(path),
        classes=len(class_names.read(path)),
        folder=path.resolve(),
    )
