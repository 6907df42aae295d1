"""Evaluation over a finite split: every image counts exactly once, on any number of devices."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from beit_jax.task import Batch, Task, Weights, row_keys


def make_eval_step(task: Task, seed: int) -> Callable[[Weights, Batch], dict]:
    """Returns the jitted `(weights, batch) -> sums`.

    Keys come from an example's index in the split, so held-out masks are the same for ever.
    """

    @jax.jit
    def eval_step(weights: Weights, batch: Batch):
        keys = row_keys(seed, 0, batch["index"])
        return task.eval_fn(weights.params, weights.model_state, weights.frozen, batch, keys)

    return eval_step


def evaluate(task: Task, eval_step, weights: Weights, batches: Iterable[Batch]) -> dict[str, float]:
    """Adds `eval_step` up over `batches` on the host, in 64 bits, and finalises the sums.

    So counts are exact for data of any size; and with one batch in flight memory is bounded.
    """
    total = None
    for batch in batches:
        sums = jax.tree.map(_wide, jax.device_get(eval_step(weights, batch)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return jax.device_get(task.finalize(total))


def _wide(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums, np.int64 if np.issubdtype(sums.dtype, np.integer) else np.float64)
