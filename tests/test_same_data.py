"""Training data that changed while a run stood still."""

import json

import cv2
import jax
import numpy as np
import pytest
import tiny

from beit_jax import same_data
from beit_jax.data import sources
from beit_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
    for number in range(30):
        add(tmp_path / "photos", f"class_{number % 2}/{number}.png")
    return tmp_path / "photos"


def add(photos, name: str) -> None:
    path = photos / name
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((8, 8), 7, np.uint8))


def source(photos):
    return sources.open_source(f"folder:{photos}", "all")


def one_more(photos):
    add(photos, "class_0/new.png")


def renamed(photos):
    (photos / "class_0" / "0.png").rename(photos / "class_0" / "00.png")


def a_class_more(photos):
    add(photos, "class_2/new.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_more, "31 examples in place of 30;"),
        (renamed, "other names or labels among as many examples "),
        (a_class_more, "31 examples in place of 30, class 'class_2' is new;"),
    ],
)
def test_changes_are_named(change, said, photos, tmp_path):
    same_data.keep(tmp_path, source(photos), resuming=False)
    moved = photos.rename(tmp_path / "moved")
    same_data.keep(tmp_path, source(moved), resuming=True)
    change(moved)
    with pytest.raises(UserError, match=said):
        same_data.keep(tmp_path, source(moved), resuming=True)
    same_data.keep(tmp_path, source(moved), resuming=False)  # nothing was learnt from the old
    assert json.loads((tmp_path / same_data.FILE).read_text())["examples"] == len(source(moved))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x80"])
def test_a_damaged_note_of_the_data_is_named(content, photos, tmp_path):
    (tmp_path / same_data.FILE).write_bytes(content)
    with pytest.raises(UserError, match="data.json is damaged .*; delete it to go on"):
        same_data.keep(tmp_path, source(photos), resuming=True)


def test_a_run_is_not_resumed_and_still_evaluated(photos, tmp_path):
    tree = tiny.config(
        "classify",
        model__depth=1,
        data__source=f"folder:{photos}",
        data__holdout=0.2,
        train__steps=1,
    )
    one = jax.devices()[:1]
    tiny.run(tree, tmp_path / "run", one).execute("train")
    one_more(photos)
    tiny.run(tree, tmp_path / "run", one).execute("eval")
    with pytest.raises(UserError, match="have changed since it was started: .* give --force"):
        tiny.run(tree, tmp_path / "run", one).execute("train")
