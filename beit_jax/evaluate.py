"""Evaluation over a finite split: every image counts exactly once, on any number of devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from beit_jax.task import Batch, Task, Weights, row_keys

PyTree = Any


def make_eval_step(task: Task, seed: int) -> Callable[[Weights, Batch], dict]:
    """Returns the jitted `(weights, batch) -> sums`.

    Keys come from an example's index in the split, so held-out masks are the same for ever.
    """

    @jax.jit
    def eval_step(weights: Weights, batch: Batch):
        keys = row_keys(seed, 0, batch["index"])
        return task.eval_fn(weights.params, weights.model_state, weights.frozen, batch, keys)

    return eval_step


def add_up(step: Callable[[Batch], PyTree], batches: Iterable[Batch]) -> PyTree:
    """Adds `step` up over `batches` on the devices."""
    total = None
    for batch in batches:
        sums = step(batch)
        total = sums if total is None else jax.tree.map(jax.numpy.add, total, sums)
        jax.block_until_ready(total)  # one batch in flight bounds memory
    return total


def evaluate(task: Task, eval_step, weights: Weights, batches: Iterable[Batch]) -> dict[str, float]:
    """Adds `eval_step` up over `batches` and finalises the sums."""
    return jax.device_get(task.finalize(add_up(lambda batch: eval_step(weights, batch), batches)))
