"""What a run is about to do, in the lines that it starts with."""

import math

import jax
from jax.sharding import Mesh

from beit_jax import optimizer


def describe(config, mesh: Mesh, *, steps: int, examples: int, warmup: int, state, frozen) -> str:
    """Lines about batch, learning rate, length, parameters and memory of a training run.

    Args:
      config: the resolved config.
      mesh: of all devices.
      steps: updates of the whole run.
      examples: images of the training split.
      warmup: updates until the learning rate's peak.
      state: the train state, as arrays or as shapes with shardings.
      frozen: the task's frozen weights, likewise.
    """
    rows = {
        "batch": _batch(config, mesh),
        "learning rate": _learning_rate(config, warmup),
        "length": _length(config, steps, examples),
        "parameters": _parameters(state, frozen),
        "memory": _memory(state, frozen),
    }
    return "\n".join(f"{name + ':':15}{text}" for name, text in rows.items())


def numbers(tree) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_a_device(tree) -> int:
    """Bytes that each device holds of a tree of arrays or shapes with shardings."""

    def size(leaf) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _batch(config, mesh: Mesh) -> str:
    size, parts = config.train.batch_size, config.train.accumulate
    each = size // mesh.size // parts
    devices = f"{mesh.size} device{'s' * (mesh.size > 1)}"
    microbatches = f" x {parts} microbatches" * (parts > 1)
    return f"{size:,} images an update = {devices} x {each:,} images{microbatches}"


def _learning_rate(config, warmup: int) -> str:
    c = config.optimizer
    peak = optimizer.scaled_learning_rate(
        c.learning_rate, reference_batch=c.reference_batch, batch_size=config.train.batch_size
    )
    scaled = (
        f" = {c.learning_rate:g} x {config.train.batch_size:,} / {c.reference_batch:,} images"
        if c.reference_batch
        else ""
    )
    return f"{peak:.3g}{scaled}, after {warmup:,} updates of warm-up; then {c.schedule}"


def _length(config, steps: int, examples: int) -> str:
    epochs = steps * config.train.batch_size / examples
    return f"{steps:,} updates = {epochs:,.4g} epochs of {examples:,} images"


def _parameters(state, frozen) -> str:
    fixed = numbers(frozen)
    return f"{numbers(state.params):,}" + f", and {fixed:,} that stay frozen" * bool(fixed)


def _memory(state, frozen) -> str:
    """What is known before anything is compiled: the state and, for a while, its gradients."""
    kept, fixed = bytes_a_device(state), bytes_a_device(frozen)
    gradients = bytes_a_device(state.params)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of = f" (of {_size(limit)})" if limit else ""
    return (
        f"{_size(kept + fixed + gradients)} a device{of} for weights, moments and gradients; "
        "activations come on top"
    )


def _size(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
