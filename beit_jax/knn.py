"""Exact weighted nearest neighbours by cosine similarity, without a matrix of all pairs.

The training features stay where they were computed, spread over the devices by rows. Every device
goes through its own rows, a chunk at a time, and keeps the best it has seen; the bests of all are
merged. Memory beside the features themselves: queries x (chunk + k) distances.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from beit_jax.sharding import BATCH

TEMPERATURE = 0.07  # of the votes' weights, as in DINO's evaluation (Caron et al. 2021)


class Neighbours(NamedTuple):
    """The nearest training images, nearest first; of equally near ones the earlier first."""

    distance: jax.Array  # float32 [F, Q, k], one minus the cosine; inf where there are fewer than k
    index: jax.Array  # int32 [F, Q, k], place among the training images
    labels: jax.Array  # int32 [F, Q, k]


def nearest(
    queries: jax.Array, features: jax.Array, labels: jax.Array, *, k: int, mesh: Mesh
) -> Neighbours:
    """The `k` training images nearest to each query, in each of F kinds of features.

    Args:
      queries: float32 [F, Q, D].
      features: float32 [chunks, F, B, D], of the training images in their order; each chunk's B
        rows are spread over the devices as a batch is.
      labels: int32 [chunks, B]; rows below 0 are nobody's neighbours.
    """
    chunks, rows = labels.shape
    index = jnp.arange(chunks * rows, dtype=jnp.int32).reshape(chunks, rows)
    # Distances of unit vectors are those of the vectors seen from any point. From one amid them
    # float32 tells directions apart that nearly coincide, as those of one encoder's images do.
    middle = _unit(features[0]).mean(1, keepdims=True)  # [F, 1, D]
    spread = BATCH[0]
    search = jax.shard_map(
        partial(_search, k=k),
        mesh=mesh,
        in_specs=(P(), P(), P(None, None, spread), P(None, spread), P(None, spread)),
        out_specs=P(None, None, spread),  # devices x k
        check_vma=False,
    )
    found = search(queries, middle, features, labels, index)
    distance, index, labels = jax.lax.sort(tuple(found), dimension=-1, num_keys=2)
    return Neighbours(distance[..., :k], index[..., :k], labels[..., :k])


def _search(queries, middle, features, labels, index, *, k: int) -> Neighbours:
    """The nearest of one device's rows; `top_k` puts the earlier of equals first."""
    queries = _unit(queries) - middle

    def merge(best: Neighbours, chunk):
        rows, labels, index = chunk
        distance = _distance(queries, _unit(rows) - middle)
        labels, index = (jnp.broadcast_to(x[None, None], distance.shape) for x in (labels, index))
        found = Neighbours(jnp.where(labels >= 0, distance, jnp.inf), index, labels)
        both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=-1), best, found)
        _, places = jax.lax.top_k(-both.distance, k)
        return jax.tree.map(lambda x: jnp.take_along_axis(x, places, axis=-1), both), None

    shape = (*queries.shape[:2], k)
    after_all = jnp.full(shape, jnp.iinfo(jnp.int32).max)
    nobody = Neighbours(jnp.full(shape, jnp.inf), after_all, jnp.full(shape, -1))
    return jax.lax.scan(merge, nobody, (features, labels, index))[0]


def _distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Half the squared distances [F, Q, B] of vectors [F, Q, D] and [F, B, D]."""
    products = jnp.einsum("fqd,fbd->fqb", x, y, precision=jax.lax.Precision.HIGHEST)
    lengths = (x**2).sum(-1)[:, :, None] + (y**2).sum(-1)[:, None, :]
    return lengths / 2 - products


def vote(found: Neighbours, k: int) -> jax.Array:
    """Classes int32 [F, Q] that the first `k` neighbours choose, by votes exp(cosine / 0.07).

    Of equally chosen classes the first is taken. No array is as wide as there are classes.
    """
    labels = found.labels[..., :k]
    votes = jnp.exp(-found.distance[..., :k] / TEMPERATURE)
    alike = labels[..., :, None] == labels[..., None, :]
    total = jnp.where(alike, votes[..., None, :], 0.0).sum(-1)  # for the class of each neighbour
    chosen = total == total.max(-1, keepdims=True)
    return jnp.where(chosen, labels, jnp.iinfo(jnp.int32).max).min(-1)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors [..., D] of length 1; zero stays zero."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1.0)
