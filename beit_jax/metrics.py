"""Where numbers and pictures of a run go: metrics.jsonl, TensorBoard and PNG files.

Only process 0 writes. A line of metrics.jsonl holds `step`, `split` and flat `name: number` pairs;
`null` stands for a number that does not exist. Timings have lines of their own, so that everything
else is identical between a run and its resumed twin.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter


class Writer:
    """Writes the numbers and pictures of one run."""

    def __init__(self, run: Path, resume_at: int | None):
        """Opens `run`.

        Training that goes on at update `resume_at` drops what an earlier attempt wrote beyond it;
        None only adds to what is there, for a run that may still be training elsewhere.
        """
        self._active = jax.process_index() == 0
        if self._active:
            self._run = run
            if resume_at is not None:
                drop_beyond(run / "metrics.jsonl", resume_at)
            self._lines = open(run / "metrics.jsonl", "a", buffering=1)
            self._tensorboard = SummaryWriter(
                str(run / "tensorboard"),
                purge_step=None if resume_at is None else resume_at + 1,
            )

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line, and one TensorBoard curve per value."""
        if not self._active:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "split": split, **numbers}) + "\n")
        for name, value in numbers.items():
            if value is not None:
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes uint8 [H, W, 3] pictures to TensorBoard and to pictures/<name>_<step>.png."""
        if not self._active:
            return
        for name, picture in pictures.items():
            self._tensorboard.add_image(name, picture, step, dataformats="HWC")
            path = self._run / "pictures" / f"{name}_{step}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)

    def close(self) -> None:
        if self._active:
            self._lines.close()
            self._tensorboard.close()


def drop_beyond(path: Path, step: int) -> None:
    """Removes the lines of later steps, and a line cut short by a crash, in one atomic move."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read(path.parent) if line["step"] <= step]
        write_atomically(path, "".join(kept))


def read(run: Path) -> list[dict]:
    """All lines of a run's metrics.jsonl but one that is cut short: a crash, or still written."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the last line can be cut short
    return lines


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a crash, finds the old or the new one, whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _number(value) -> float | int | None:
    number = np.asarray(value).item()
    return None if isinstance(number, float) and not math.isfinite(number) else number
