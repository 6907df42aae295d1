"""Where numbers and pictures of a run go: metrics.jsonl, TensorBoard and PNG files.

Only process 0 writes. A line of metrics.jsonl holds `step`, `split` and flat `name: number` pairs;
`null` stands for a number that does not exist. Timings have lines of their own, so that everything
else is identical between a run and its resumed twin.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import summary

from beit_jax import durable
from beit_jax.errors import UserError

NOT_EVALUATIONS = ("train", "timing")  # splits of lines that training itself writes


class Writer:
    """Writes the numbers and pictures of one run."""

    def __init__(self, run: Path, resume_at: int | None, trackers: Sequence = ()):
        """Opens `run`; `trackers` are others that want to know, see trackers.py.

        Training that goes on at update `resume_at` drops what an earlier attempt wrote beyond it;
        None only adds to what is there, for a run that may still be training elsewhere.
        """
        self._trackers = list(trackers)
        self._active = jax.process_index() == 0
        self._lost_picture = ""  # why one could not be written
        if self._active:
            self._run = run
            if resume_at is not None:
                drop_beyond(run / "metrics.jsonl", resume_at)
            self._lines = durable.Lines(run / "metrics.jsonl")
            self._curves = durable.Curves(run / "tensorboard", resume_at)

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line, and one TensorBoard curve per value."""
        if not self._active:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        self._lines.add(json.dumps({"step": step, "split": split, **numbers}))
        for name, value in numbers.items():
            if value is not None:
                self._curves.add(summary.scalar(f"{split}/{name}", value), step)
        exist = {name: value for name, value in numbers.items() if value is not None}
        self._tell(lambda tracker: tracker.scalars(step, split, exist))

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes uint8 [H, W, 3] pictures to TensorBoard and to pictures/<name>_<step>.png."""
        if not self._active:
            return
        for name, picture in pictures.items():
            self._curves.add(summary.image(name, picture, dataformats="HWC"), step)
            path = self._run / "pictures" / f"{name}_{step}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(picture).save(path)
            except OSError as error:
                self._lost_picture = f"{path} cannot be written ({error})"
            else:
                self._tell(lambda tracker, name=name, path=path: tracker.picture(step, name, path))

    def flush(self) -> None:
        """Returns when all numbers are on disk; raises OSError where they cannot be written."""
        if self._active:
            self._curves.flush()
            self._lines.flush()

    def alarms(self) -> dict[str, str]:
        """What a person must act on, by what it is about: numbers that cannot be written."""
        if not self._active or not (problem := self._lines.error or self._lost_picture):
            return {}
        self._lost_picture = ""
        return {
            "writing": f"{self._run} cannot be written ({problem}); make room or mend the disk: "
            "numbers wait in memory, pictures are lost."
        }

    def lines(self) -> list[dict]:
        """What has been written so far; nothing on processes that do not write."""
        return read(self._run) if self._active else []

    def close(self) -> None:
        if self._active:
            self._lines.close()
            self._curves.close()
        self._tell(lambda tracker: tracker.close())

    def _tell(self, say: Callable[[Any], None]) -> None:
        """Tells all trackers; one that fails costs its own curves from here on, and not the run."""
        for tracker in list(self._trackers):
            try:
                say(tracker)
            except Exception as error:  # of whatever kind: a network, a server, a full quota
                self._trackers.remove(tracker)
                print(
                    f"ALARM: {type(tracker).__name__} is told no more of this run: {error}; its "
                    "numbers are in metrics.jsonl, and the next start tries again.",
                    file=sys.stderr,
                )


def drop_beyond(path: Path, step: int) -> None:
    """Removes the lines of later steps, and a line cut short by a crash, in one atomic move."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read(path.parent) if line["step"] <= step]
        write_atomically(path, "".join(kept))


def read(run: Path) -> list[dict]:
    """All lines of a run's metrics.jsonl."""
    return read_lines(run / "metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
    """The objects of a file, one a line, but a last one cut short: by a crash, or still written.

    Raises:
      UserError: another line is damaged.
    """
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found.append(_whole(json.loads(line)))
        except ValueError as error:
            if number < len(lines):
                raise UserError(
                    f"line {number} of {path} is damaged; mend it, or delete the line."
                ) from error
    return found


def _whole(line) -> dict:
    if not isinstance(line, dict) or "step" not in line:
        raise ValueError("no line of ours")
    return line


def evaluated(split: str) -> str:
    """What the lines of a data split's evaluation are called, as `train` are those of updates."""
    return f"eval_{split}" if split in NOT_EVALUATIONS else split


def evaluations(run: Path) -> dict[int, dict]:
    """The first evaluation of every update that has one, which is training's own."""
    found: dict[int, dict] = {}
    if (run / "metrics.jsonl").exists():
        for line in read(run):
            if line["split"] not in NOT_EVALUATIONS:
                found.setdefault(line["step"], line)
    return found


def last_step(run: Path) -> int:
    """The last update that a run's metrics.jsonl speaks of; 0 where there is no such file."""
    lines = read(run) if (run / "metrics.jsonl").exists() else []
    return max((line["step"] for line in lines), default=0)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a crash, finds the old or the new one, whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _number(value) -> float | int | None:
    number = np.asarray(value).item()
    return None if isinstance(number, float) and not math.isfinite(number) else number
