"""The contract between a task (what is learnt) and the loop (how it is run).

A task is a tuple of pure functions over arrays. Losses and metrics are sums with their weights,
never means, so that microbatches, devices and hosts add up to the global mean exactly. Randomness
is one key per row, so that neither the number of devices nor of microbatches changes a draw.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beit_jax.data.pipeline import Views

PyTree = Any
Batch = Mapping[str, jax.Array]
Sums = Mapping[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight); a sum may be a histogram
Pictures = Mapping[str, jax.Array]  # name -> uint8 [H, W, 3]


class Purpose(IntEnum):
    """What a random draw is for; folded into a row's key so that draws never share bits."""

    JITTER = 0
    MASK = 1
    DROP_PATH = 2
    GUMBEL = 3
    RESTART = 4
    KMEANS = 5
    ERASE = 6
    MIX = 7
    PHOTOMETRIC = 8


class Weights(NamedTuple):
    """What an evaluation reads: the averaged weights where the task keeps them."""

    params: PyTree
    model_state: PyTree
    frozen: PyTree


class Answers(NamedTuple):
    """How predictions reach a person, on the host.

    Attributes:
      of: `row -> answer`: what `predict` gave for one image (a pytree of NumPy arrays without the
        batch axis), in a person's terms, such as the likeliest classes by name.
      file: where `--mode=predict` writes, below the run's folder: a file, or a folder of them.
      writer: `path of that file -> context manager`; within it, its value is called once for each
        image that can be read, in order, with `(name of the image, answer)`. What it writes stands
        in its place when the context ends.
    """

    of: Callable[[PyTree], Any]
    file: str
    writer: Callable[[Path], AbstractContextManager[Callable[[str, Any], None]]]


class Task(NamedTuple):
    """Pure functions of one task; `B` is the number of rows that a call sees.

    Attributes:
      views: batch key -> the size and interpolation of that view of a crop; or scenes, which are
        images with label maps.
      init: `key -> (params, model_state)`.
      augment: `(batch, keys [B]) -> batch`: what chance does to a global batch of training before
        it is split into microbatches, so that rows may be mixed with each other.
      loss_fn: `(params, model_state, frozen, batch, keys [B], step) ->
        ((loss_sum, weight), (statistics, sums))`. The gradient is taken of the loss sum and divided
        by the weight, both summed over the global batch.
      eval_fn: `(params, model_state, frozen, batch, keys [B]) -> sums`. Rows that are not
        `batch["valid"]` are padding and must weigh nothing.
      finalize: `sums -> {name: scalar}`, for training and evaluation alike, traceable.
      frozen: weights that are read and never trained; always an argument of the jitted step.
      copies: frozen networks by kind that a training run is to keep, see `frozen.keep`.
      frozen_init: whether `config.init.path` names a frozen network of the task's, and no weights
        to start from.
      scale_updates: `updates of params -> updates`, after all else of the optimizer, such as a
        learning rate of their own for some; None changes nothing.
      update_state: `(model_state, statistics) -> model_state`, once per update, from the statistics
        of `loss_fn` summed over the global batch. Collection "history" of the model state is the
        training's own: no network has it, and evaluation does without.
      schedules: name -> function of the step, logged beside the metrics.
      warm_start: what a fresh run does to its model state before the first update, or None:
        `(params, model_state, frozen, batches) -> (model_state, line that says what was done)`,
        where `batches` gives endless global batches on the devices, from the first one.
      alarms: `metrics -> {name: sentence}` about what a person must act on, from the numbers of an
        update or of an evaluation, on the host; empty where all is well.
      evaluators: name -> `(Weights, batches) -> ({name: number}, pictures)`, where `batches(split)`
        gives the finite, padded batches of a split, already on the devices.
      predict: `(Weights, batch) -> pytree of arrays [B, ...]`, what the task is for.
      class_names: of the outputs of a head over classes, which the run's folder keeps.
      answers: how predictions reach a person, or None where they are for no person to read.
    """

    views: Views
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss_fn: Callable[..., tuple[tuple[jax.Array, jax.Array], tuple[PyTree, Sums]]]
    eval_fn: Callable[..., Sums]
    finalize: Callable[[Sums], Mapping[str, jax.Array]]
    frozen: PyTree
    predict: Callable[..., PyTree]
    augment: Callable[[Batch, jax.Array], Batch] = lambda batch, keys: batch
    copies: Mapping[str, Any] = {}
    frozen_init: bool = False
    scale_updates: Callable[[PyTree], PyTree] | None = None
    update_state: Callable[[PyTree, PyTree], PyTree] = lambda model_state, statistics: model_state
    schedules: Mapping[str, Callable[[jax.Array], jax.Array]] = {}
    warm_start: Callable[..., tuple[PyTree, str]] | None = None
    alarms: Callable[[Mapping[str, float]], Mapping[str, str]] = lambda metrics: {}
    evaluators: Mapping[str, Callable[..., tuple[Mapping[str, float], Pictures]]] = {}
    class_names: tuple[str, ...] = ()
    answers: Answers | None = None


def keys_for(keys: jax.Array, purpose: Purpose) -> jax.Array:
    """Derives the keys [B] of one purpose from the rows' keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, int(purpose))


def row_keys(seed: int, step: jax.Array, rows: jax.Array) -> jax.Array:
    """Keys [B] that depend on (seed, step, global row) and on nothing else."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def mean_of_sums(sums: Sums) -> dict[str, jax.Array]:
    """Divides every sum by its weight; a weight of zero gives NaN, which is logged as null."""
    return {name: total / weight for name, (total, weight) in sums.items()}


def example_weights(batch: Batch) -> jax.Array:
    """Weight [B] of every row: 0 for the padding of the last evaluation batch, else 1."""
    rows = next(iter(batch.values())).shape[0]
    return batch["valid"].astype(jnp.float32) if "valid" in batch else jnp.ones(rows)
