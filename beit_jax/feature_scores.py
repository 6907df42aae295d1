"""What frozen features are worth: k-NN and a linear probe, during pre-training and after it.

The features of the training split are computed once an evaluation and stay on the devices, spread
over them by rows; the images that are scored stream past them. That takes, over all devices
together, 4 bytes x training images x blocks x 2 poolings x width: 94 GB for ImageNet-1k with the 12
blocks of the base model, 16 GB with two of them (`config.eval.blocks`). The host holds one batch.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from beit_jax import evaluate, features, knn, logistic
from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.sharding import BATCH
from beit_jax.task import Batch, Weights

ENCODER, PIXELS = "", "pixel_"  # whose features; also the beginning of their scores' names


class Described(NamedTuple):
    """Features of images, F kinds of them, and labels; [chunks, ...] before all for a split."""

    features: Mapping[str, jax.Array]  # whose -> float32 [F, B, D]
    labels: jax.Array  # int32 [B]; -1: no image, or one outside of the classes


def make_evaluator(config, source: Source) -> Callable:
    """A task's evaluator of the frozen features of `weights.params["encoder"]`.

    What is chosen (block and pooling, for k-NN also k) is chosen on `config.eval.select_split`; the
    score is that choice's on `config.data.eval_split`. Where the two are one split, it is the best
    there. Of equals the first is chosen, CLS before the mean, then block by block. Every function
    is compiled once: an evaluation brings other weights and nothing else.

    Args:
      config: the resolved config; `config.model` is the encoder's.
      source: the training data.

    Raises:
      UserError: without labels, for more neighbours than images or blocks that do not exist, and
        for features that the devices cannot hold.
    """
    blocks = _blocks(config)
    _check(config, source, len(blocks))
    describe = _make_describe(config, blocks)
    keep = jax.jit(partial(_keep, describe), donate_argnums=0)
    fit = jax.jit(partial(_fit, classes=len(source.class_names)))
    count = jax.jit(partial(_count, describe, config.eval.knn), static_argnames="mesh")

    def evaluator(weights: Weights, batches):
        params, bank = weights.params["encoder"], None
        for place, batch in enumerate(batches(config.data.train_split)):
            if bank is None:
                mesh = batch["image"].sharding.mesh
                chunk = jax.eval_shape(describe, params, batch)
                bank = _empty(chunk, math.ceil(len(source) / len(batch["label"])), mesh)
            bank = keep(bank, place, params, batch)
        linear = fit(bank) if config.eval.probe else {}

        def hits(split: str):
            def step(batch):
                return count(bank, linear, params, batch, mesh=mesh)

            return jax.device_get(evaluate.add_up(step, batches(split)))

        select_split, eval_split = config.eval.select_split, config.data.eval_split
        select = hits(select_split)
        test = select if eval_split == select_split else hits(eval_split)
        return _report(select, test, blocks, config.eval.knn), {}

    return evaluator


def _make_describe(config, blocks: tuple[int, ...]) -> Callable:
    """Returns `(encoder params, batch) -> Described`, traceable."""
    extract = features.make_extractor(config)

    def describe(params, batch: Batch) -> Described:
        found = extract(params, batch["image"])
        chosen = [found[pooling][:, block] for pooling in features.POOLINGS for block in blocks]
        values = {ENCODER: jnp.stack(chosen)}
        if config.eval.pixels:
            rows = len(batch["image"])
            values[PIXELS] = batch["image"].reshape(1, rows, -1).astype(jnp.float32)
        return Described(values, jnp.where(batch["valid"], batch["label"], -1))

    return describe


def _empty(chunk: Described, chunks: int, mesh: Mesh) -> Described:
    """Room for the features of a split, the rows of each chunk spread over the devices."""

    def zeros(like, spec: P):
        shape = (chunks, *like.shape)
        return jnp.zeros(shape, like.dtype, device=NamedSharding(mesh, spec))

    values = {whose: zeros(x, P(None, None, *BATCH)) for whose, x in chunk.features.items()}
    return Described(values, zeros(chunk.labels, P(None, *BATCH)))


def _keep(describe, bank: Described, place: jax.Array, params, batch: Batch) -> Described:
    """Puts a batch in its place."""
    chunk = describe(params, batch)
    return jax.tree.map(lambda room, new: room.at[place].set(new), bank, chunk)


def _fit(bank: Described, classes: int) -> dict[str, logistic.Linear]:
    """A linear classifier on each of the features."""
    fit = jax.vmap(partial(logistic.fit, classes=classes), in_axes=(1, None))
    return {whose: fit(x, bank.labels) for whose, x in bank.features.items()}


def _count(describe, ks: tuple[int, ...], bank: Described, linear, params, batch: Batch, mesh):
    """({whose: {classifier: hits int32 [F, K]}}, labelled images); K is 1 for the probe."""
    queries, labels = describe(params, batch)
    known = labels >= 0

    def hits(guesses):  # [F, B] each
        right = jnp.stack(guesses, axis=1) == labels[None, None]
        return (right & known[None, None]).sum(-1)

    found = {whose: {} for whose in queries}
    for whose, x in queries.items():
        if ks:
            near = knn.nearest(x, bank.features[whose], bank.labels, k=max(ks), mesh=mesh)
            found[whose]["knn"] = hits([knn.vote(near, k) for k in ks])
        if linear:
            logits = jax.vmap(logistic.logits)(linear[whose], x)
            found[whose]["probe"] = hits([logits.argmax(-1)])
    return found, known.sum()


def _report(select, test, blocks: tuple[int, ...], ks: tuple[int, ...]) -> dict[str, float]:
    """Scores of the choices; raw pixels are scored, and no choice but k is theirs."""
    (chosen_by, _), (scored, images) = select, test
    scores = {}
    for whose, classifiers in chosen_by.items():
        for name, hits in classifiers.items():
            feature, k = np.unravel_index(hits.argmax(), hits.shape)
            scores[whose + name] = scored[whose][name][feature, k] / images
            if name == "knn":
                scores[f"{whose}knn_k"] = ks[k]
            if whose == ENCODER:
                pooling, block = divmod(int(feature), len(blocks))
                scores[f"{name}_block"] = blocks[block]
                scores[f"{name}_from_cls"] = int(features.POOLINGS[pooling] == "cls")
    return scores


def _blocks(config) -> tuple[int, ...]:
    """The blocks whose outputs are scored, counted from 0."""
    depth = config.model.depth
    if not all(-depth <= block < depth for block in config.eval.blocks):
        raise UserError(
            f"config.eval.blocks={config.eval.blocks} names blocks that the encoder does not have; "
            f"it has {depth}: 0 is the first and {depth - 1}, or -1, the last."
        )
    return tuple(range(depth)[block] for block in config.eval.blocks) or tuple(range(depth))


def _check(config, source: Source, blocks: int) -> None:
    """Refuses before training what would only fail at the first evaluation."""
    if not source.class_names:
        raise UserError(
            f"config.eval.knn and config.eval.probe need labels, and {config.data.source} has "
            "none; switch them off or sort the images into one sub-folder a class."
        )
    if config.eval.knn and max(config.eval.knn) > len(source):
        raise UserError(
            f"config.eval.knn={config.eval.knn} asks for more neighbours than the {len(source)} "
            f"images of config.data.train_split={config.data.train_split}; ask for fewer."
        )
    numbers = blocks * len(features.POOLINGS) * config.model.width
    if config.eval.pixels:
        numbers += math.prod(config.data.image_size) * config.data.channels
    share = 4 * numbers * len(source) / jax.device_count()  # bytes
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if share > 0.8 * memory:  # the rest is for the training's own state
        raise UserError(
            f"config.eval.knn and config.eval.probe would keep {share / 1e9:.1f} GB of features of "
            f"{len(source)} images on each device of {memory / 1e9:.1f} GB; name fewer "
            f"config.eval.blocks, such as --config.eval.blocks={config.model.depth * 2 // 3}."
        )
