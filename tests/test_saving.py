"""A disk that cannot be written: training goes on, says so, and saves when it can."""

import resource

import jax
import pytest
import tiny

from beit_jax import checkpoint, durable, metrics, saving
from beit_jax.errors import UserError

STEPS = 12


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    return tiny.config(
        "classify",
        model__depth=1,
        train__steps=STEPS,
        train__checkpoint_every=3,
        train__eval_every=6,
        train__max_failed_saves=6,
    )


def blocked(run, first: int, last: int) -> None:
    """Nothing can be saved while the run makes updates `first` to `last`."""
    batches, checkpoints = run.train_batches, run.folder / "checkpoints"
    aside = run.folder / "aside"

    def batches_meanwhile(start):
        for number, batch in enumerate(batches(start), start + 1):
            if number == first:
                checkpoints.rename(aside)
                checkpoints.write_text("where a folder belongs")
            if number == last + 1:
                checkpoints.unlink()
                aside.rename(checkpoints)
            yield batch

    run.train_batches = batches_meanwhile


def values(folder) -> list[dict]:
    return [line for line in metrics.read(folder) if line["split"] != "timing"]


def test_saves_that_fail_are_tried_again(recipe, tmp_path, capsys):
    whole = tiny.run(recipe, tmp_path / "whole", jax.devices()[:1])
    whole.execute("train")
    run = tiny.run(recipe, tmp_path / "run", jax.devices()[:1])
    blocked(run, 5, 8)  # the checkpoints of 6, and again of 7 and 8
    run.execute("train")
    said = capsys.readouterr().out
    assert "ALARM at update" in said and "saving failed 2 times in a row (" in said
    assert values(run.folder) == values(whole.folder)
    last, expected = (checkpoint.load_weights(str(r.folder), "a test") for r in (run, whole))
    assert last.source.endswith(f"/{STEPS}") and last.digest == expected.digest


def test_a_save_that_cannot_fit_is_not_begun(recipe, tmp_path, monkeypatch):
    recipe.train.max_failed_saves = 1
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: (10**9, 10**9 - 99, 99))
    run = tiny.run(recipe, tmp_path / "run", jax.devices()[:1])
    with pytest.raises(UserError, match="a checkpoint takes [0-9,]+ bytes, and 99 are free"):
        run.execute("train")
    assert not any((run.folder / "checkpoints").iterdir())


def test_too_many_in_a_row_end_the_run(recipe, tmp_path):
    recipe.train.max_failed_saves = 2
    run = tiny.run(recipe, tmp_path / "run", jax.devices()[:1])
    blocked(run, 5, STEPS)
    with pytest.raises(UserError, match="saving failed 2 times in a row .config.train.max_failed"):
        run.execute("train")
    assert max(line["step"] for line in values(run.folder)) < STEPS


def test_lines_that_do_not_fit_wait_and_are_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = durable.Lines(path)
    lines.add("first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))  # as a disk with room for 3 bytes
    try:
        lines.add("second")
        lines.add("third")
        full, why = path.read_text(), lines.error
        with pytest.raises(OSError):
            lines.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full == "first\n" and "File too large" in why
    lines.add("fourth")
    assert path.read_text() == "first\nsecond\nthird\nfourth\n" and not lines.error


def test_curves_survive_a_full_disk(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        for step in range(50):
            writer.scalars(step, "train", {"loss": 1.0})
        alarms = writer.alarms()
        with pytest.raises(OSError):
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "numbers wait in memory" in alarms["writing"]
    writer.scalars(50, "train", {"loss": 1.0})
    writer.flush()
    writer.close()
    assert [line["step"] for line in metrics.read(tmp_path)] == list(range(51))
