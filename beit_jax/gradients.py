"""What an update takes from its batch: gradient, statistics and sums, over all microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from beit_jax import sharding
from beit_jax.task import Batch, Task, row_keys

PyTree = Any


def make_gradients(task: Task, mesh: Mesh, *, seed: int, microbatches: int) -> Callable:
    """Returns what an update takes from a batch, traceable.

    `(state, frozen, batch) -> (gradient of the loss sum, (weight, (statistics, sums)))`, all summed
    over the global batch.
    """

    def gradients(state, frozen: PyTree, batch: Batch):
        rows = next(iter(batch.values())).shape[0]
        keys = row_keys(seed, state.step, jnp.arange(rows))
        batch = task.augment(batch, keys)

        def of_microbatch(batch, keys):
            def loss_sum(params):
                (loss, weight), aux = task.loss_fn(
                    params, state.model_state, frozen, batch, keys, state.updates_made
                )
                return loss, (weight, aux)

            (_, aux), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.params)
            return grads, aux

        return _accumulate(of_microbatch, (batch, keys), microbatches, mesh)

    return gradients


def _accumulate(fn, rows: PyTree, microbatches: int, mesh: Mesh):
    """Sums `fn(*rows)` over microbatches, each spread over all devices as the batch is.

    Microbatch `a` takes every `microbatches`-th row, so each device cuts up its own rows and
    nothing moves.
    """
    if microbatches == 1:
        return fn(*rows)

    def split(x):
        x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *sharding.BATCH)))

    def body(total, rows):
        return jax.tree.map(jnp.add, total, fn(*rows)), None

    stacked = jax.tree.map(split, rows)
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, stacked)[0]
