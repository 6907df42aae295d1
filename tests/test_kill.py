"""A run that is killed again and again ends as if it had not been.

It is killed with SIGKILL, which no program can answer, at moments that a seeded generator draws in
each of its phases, and started again with the same command. Twenty kills take a minute; for more:

  BEIT_JAX_KILLS=100 python -m pytest tests/test_kill.py
"""

import os
import time
from collections import Counter
from pathlib import Path

import kill_driver
import numpy as np
import pytest
import tiny

from beit_jax import checkpoint, metrics

KILLS = int(os.environ.get("BEIT_JAX_KILLS", "20"))
STEPS, EVAL_EVERY, CHECKPOINT_EVERY = 40 + 7 * KILLS, 10, 5
SEED = int(os.environ.get("BEIT_JAX_KILL_SEED", "0"))
PHASES = ("start", "update", "save", "evaluation")


@pytest.fixture(scope="module")
def recipe():
    return tiny.config(
        "classify",
        model__width=16,
        model__depth=1,
        model__drop_path=0.1,
        train__batch_size=64,
        train__steps=STEPS,
        train__ema_decay=0.9,
        train__checkpoint_every=CHECKPOINT_EVERY,
        train__eval_every=EVAL_EVERY,
        eval__batch_size=8,  # 44 batches, so that an evaluation takes its time
        data__workers=2,
    )


def values(folder: Path) -> list[dict]:
    return [line for line in metrics.read(folder) if line["split"] != "timing"]


def seen(folder: Path) -> set[tuple[int, str]]:
    """Which lines a run has written so far."""
    if not (folder / "metrics.jsonl").exists():
        return set()
    return {(line["step"], line["split"]) for line in values(folder)}


def reached(folder: Path, phase: str, step: int) -> bool:
    """Whether a run is in a phase, at an update or beyond it."""
    lines = seen(folder)
    made = max((at for at, _ in lines), default=0)
    if phase == "save":
        saving = (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        return made >= step and any(True for _ in saving)
    if phase == "evaluation":
        return made >= step and made % EVAL_EVERY == 0 and (made, "validation") not in lines
    return made >= step


def kill(folder: Path, phase: str, random: np.random.Generator) -> str:
    """Starts or resumes a run and kills it in a phase; returns the phase in which it was."""
    saved = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    step = max(saved, default=0) + int(random.integers(1, CHECKPOINT_EVERY + 3))
    process = kill_driver.start(kill_driver.train, folder)
    if phase == "start":
        time.sleep(random.uniform(0.1, 2.0))
    else:
        while process.is_alive() and not reached(folder, phase, step):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
    was_alive = process.is_alive()
    process.kill()
    process.join()
    return phase if was_alive else "ended"


def to_the_end(folder: Path) -> None:
    process = kill_driver.start(kill_driver.train, folder)
    process.join()
    assert process.exitcode == 0, (folder / "output.txt").read_text()


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(recipe, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        tiny.store_config(folder, recipe)
    to_the_end(whole)

    random = np.random.default_rng(SEED)
    phases = [PHASES[number % len(PHASES)] for number in range(KILLS)]
    met = Counter(kill(killed, phase, random) for phase in random.permutation(phases))
    to_the_end(killed)

    print(f"\n{KILLS} kills: {dict(met)}")
    assert set(PHASES) <= set(met), "no kill came in time"
    lines = values(killed)
    assert [line["step"] for line in lines if line["split"] == "train"] == [*range(1, STEPS + 1)]
    assert lines == values(whole)
    digests = {}
    for folder in (whole, killed):
        for path in (folder / "checkpoints").iterdir():
            weights = checkpoint.load_weights(str(path), "a test")
            digests.setdefault(int(path.name), set()).add(weights.digest)
    assert STEPS in digests and all(len(found) == 1 for found in digests.values()), digests
    assert not list((killed / "checkpoints").glob("*tmp*"))
