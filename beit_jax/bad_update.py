"""What is kept of the update that ended a run because it was not finite.

The folder bad_update_<step>/ of the run is the folder of a run itself: with the state before that
update, so that training in it makes the update again. Beside that it holds the batch as batch.npz,
and non_finite.txt, the names of what was not finite, in the order in which it comes about.
"""

import contextlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from beit_jax import checkpoint
from beit_jax.gradients import make_gradients
from beit_jax.task import Batch, Task

STAGES = (
    "weights of",
    "model state",
    "frozen weights of",
    "batch's",
    "statistics of",
    "sum of",
    "gradient of",
    "norm of the gradient",
)


def keep(run: Path, config, task: Task, state, batch: Batch) -> str:
    """Writes the folder.

    Args:
      run: the run's folder.
      config: the run's.
      state: after the update, which was skipped: all but its counters is as before.
      batch: of the update, on the devices.

    Returns:
      the sentence that ends the run.
    """
    before = state._replace(
        step=state.step - 1,
        skipped=state.skipped - 1,
        skipped_in_a_row=state.skipped_in_a_row - 1,
    )
    step, in_a_row = int(state.step), int(state.skipped_in_a_row)
    names = non_finite(config, task, before, batch)
    rows = multihost_utils.process_allgather(batch, tiled=True)
    folder = run / f"bad_update_{step}"
    try:
        _write(folder, run, config, before, rows, names)
        where = f"the state before, the batch and all names are in {folder}"
    except Exception as error:  # the end of the run says more than why this failed
        where = f"{folder} cannot be written ({error})"
    return (
        f"The last {in_a_row} updates up to {step} were not finite (config.train.max_skipped="
        f"{config.train.max_skipped}), beginning with {names[0]}; {where}; start in a new "
        "--workdir with a lower config.optimizer.learning_rate, a longer warm-up or a smaller "
        "config.optimizer.clip."
    )


def non_finite(config, task: Task, state, batch: Batch) -> list[str]:
    """Names of what is not finite, at least one, in the order in which it comes about.

    First what goes into the update: weights, what the network keeps beside them, and the batch;
    then what the forward pass makes of them; then the gradient.
    """

    mesh = next(iter(batch.values())).sharding.mesh
    gradients = make_gradients(task, mesh, seed=config.seed, microbatches=config.train.accumulate)

    @jax.jit
    def look(state, frozen, batch):
        grads, (_, (statistics, sums)) = gradients(state, frozen, batch)
        totals = {name: total for name, (total, _) in sums.items()}
        stages = (
            state.params,
            state.model_state,
            frozen,
            batch,
            statistics,
            totals,
            grads,
            optax.tree.norm(grads),
        )
        return jax.tree.map(lambda x: jnp.isfinite(x).all(), stages)

    found = jax.device_get(look(state, task.frozen, batch))
    names = [
        f"{stage} {jax.tree_util.keystr(path, simple=True, separator='/')}".strip()
        for stage, tree in zip(STAGES, found, strict=True)
        for path, finite in jax.tree_util.tree_leaves_with_path(tree)
        if not finite
    ]
    return names or ["nothing that a repetition could find"]


def _write(folder: Path, run: Path, config, state, rows: dict, names: list[str]) -> None:
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        folder.mkdir()
        shutil.copy(run / "config.json", folder)
        (folder / "frozen").symlink_to(Path("..") / "frozen")
        np.savez(folder / "batch.npz", **rows)
        (folder / "non_finite.txt").write_text("".join(f"{name}\n" for name in names))
    keeper = checkpoint.Keeper(folder, keep=1, best=config.eval.best, maximize=config.eval.maximize)
    with contextlib.closing(keeper):
        keeper.save(state)
        keeper.wait()
