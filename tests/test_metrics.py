"""metrics.jsonl is exact, also after a crash."""

import json

import numpy as np
import pytest

from beit_jax import metrics
from beit_jax.errors import UserError


def test_lines_hold_flat_numbers_and_null(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    writer.scalars(1, "train", {"loss": np.float32(0.5), "accuracy": float("nan")})
    writer.scalars(1, "timing", {"step_seconds": 2})
    writer.close()
    assert metrics.read(tmp_path) == [
        {"step": 1, "split": "train", "loss": 0.5, "accuracy": None},
        {"step": 1, "split": "timing", "step_seconds": 2},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "split": "train", "loss": 0.0}) for s in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "spl')
    metrics.drop_beyond(path, 2)
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", [b"{", b"7", b"\x80\xff", b"{}"])
def test_a_damaged_line_is_named_and_nothing_behind_it_is_dropped(damage, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(
        UserError, match=f"line 2 of {path} is damaged; mend it, or delete the line."
    ):
        metrics.drop_beyond(path, 9)
    assert path.read_bytes().endswith(b'{"step": 3}\n')


def test_pictures_are_written_as_png(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    writer.pictures(7, {"reconstruction": np.zeros((4, 6, 3), np.uint8)})
    writer.close()
    assert (tmp_path / "pictures" / "reconstruction_7.png").read_bytes()[1:4] == b"PNG"
