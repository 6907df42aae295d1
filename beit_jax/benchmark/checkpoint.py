"""What saving costs a training."""

import argparse
import contextlib
import statistics
from pathlib import Path

from ml_collections import ConfigDict

from beit_jax import checkpoint
from beit_jax.benchmark import step, timing


def measure(config: ConfigDict, folder: Path, options: argparse.Namespace) -> dict:
    """How long the loop stands still for a save, and how much slower it is until it is written.

    Each turn is a save, the update after it, and the wait until it is written.
    """
    training = step.make_steps(config, folder)["step"]
    alone = timing.in_turns({"step": training}, options.repeats)["step"]
    keeper = checkpoint.Keeper(folder, keep=1, best=config.eval.best, maximize=False)
    still, slowed = [], []
    with contextlib.closing(keeper):
        for _ in range(options.repeats):
            still.append(timing.seconds(lambda: keeper.save(training.state)))
            slowed.append(timing.seconds(training))
            keeper.wait()
    seconds = statistics.median(alone)
    lost = statistics.median(still) + max(0.0, statistics.median(slowed) - seconds)
    return {
        "step_seconds": seconds,
        "standing_still_seconds": statistics.median(still),
        "next_step_seconds": statistics.median(slowed),
        "checkpoint_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "updates_between_saves": config.train.checkpoint_every,
        "lost_share": lost / (config.train.checkpoint_every * seconds),
    }
