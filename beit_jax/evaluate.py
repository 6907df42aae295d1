"""Evaluation over a finite split: every image counts exactly once, on any number of devices."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

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
    """Adds `step` up over `batches`, where it puts its sums: on the devices, or on the host."""
    total = None
    for batch in batches:
        sums = step(batch)
        total = sums if total is None else jax.tree.map(operator.add, total, sums)
        jax.block_until_ready(total)  # one batch in flight bounds memory
    return total


def evaluate(task: Task, eval_step, weights: Weights, batches: Iterable[Batch]) -> dict[str, float]:
    """Adds `eval_step` up over `batches` on the host and finalises the sums.

    In 64 bits, so that counts are exact for data of any size.
    """

    def step(batch):
        return jax.tree.map(_wide, jax.device_get(eval_step(weights, batch)))

    sums = add_up(step, batches)
    with np.errstate(invalid="ignore"):  # NaN stands for a number that does not exist
        return jax.device_get(task.finalize(sums))


def _wide(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums, np.int64 if np.issubdtype(sums.dtype, np.integer) else np.float64)
