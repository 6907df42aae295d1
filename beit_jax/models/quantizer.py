"""Vector quantisation on the unit sphere, with a codebook that follows its codes' averages.

The codebook is no parameter: no gradient reaches it. A training step adds up `Statistics` over its
global batch, and `follow` moves the codebook once, so that devices and microbatches change nothing.
Source: beit2/norm_ema_quantizer.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
    """Vectors and what became of them."""

    tokens: jax.Array  # int32 [...], the nearest codes
    normalized: jax.Array  # float32 [..., E], the vectors on the unit sphere
    codes: jax.Array  # float32 [..., E], the codes' values with the gradient of `normalized`
    commitment: jax.Array  # float32 [...], mean squared distance from the code, for a loss


class Statistics(NamedTuple):
    """Sums over vectors; those of two batches add up to those of both."""

    counts: jax.Array  # float32 [K], vectors of each code
    sums: jax.Array  # float32 [K, E], of these vectors on the unit sphere


class Candidates(NamedTuple):
    """Vectors that dead codes may start again from; those of two batches add up, too.

    Each lies in a slot that its row's own key drew, so neither devices nor microbatches move it. A
    slot with more than one is of no use: the sum of two vectors is neither of them.
    """

    vectors: jax.Array  # float32 [S, E]
    rows: jax.Array  # float32 [S], how many vectors were added up in each slot


def normalize(vectors: jax.Array) -> jax.Array:
    """Vectors [..., E] on the unit sphere, float32; zero stays zero, with a gradient of zero."""
    vectors = vectors.astype(jnp.float32)
    square = jnp.sum(vectors**2, axis=-1, keepdims=True)
    # As torch's `normalize`, whose least length is 1e-12, but without the root's slope at zero.
    return vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def nearest(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
    """The codes [K, E] nearest to float32 vectors [..., E]: int32 [...]."""
    # Full float32 on every backend: which code is nearest must not hang on rounding. A vector's
    # own length is the same for all codes.
    products = jnp.einsum("...e,ke->...k", vectors, codebook, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.sum(codebook**2, axis=-1)
    distances = lengths.reshape((1,) * (vectors.ndim - 1) + (-1,)) - 2 * products
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def quantize(vectors: jax.Array, codebook: jax.Array) -> Quantized:
    """Replaces vectors [..., E] by the codes [K, E] nearest to them on the unit sphere.

    The gradient goes straight through to the normalised vectors, none goes to the codebook.
    """
    normalized, codebook = normalize(vectors), jax.lax.stop_gradient(codebook)
    tokens = nearest(jax.lax.stop_gradient(normalized), codebook)
    codes = codebook[tokens]
    commitment = jnp.mean((codes - normalized) ** 2, axis=-1)
    through = normalized + jax.lax.stop_gradient(codes - normalized)
    return Quantized(tokens, normalized, through, commitment)


def statistics(normalized: jax.Array, tokens: jax.Array, codes: int) -> Statistics:
    """Counts and sums of vectors [..., E] by their tokens int32 [...] among `codes` codes."""
    vectors = jax.lax.stop_gradient(normalized).reshape(-1, normalized.shape[-1])
    chosen = jax.nn.one_hot(tokens.reshape(-1), codes, dtype=jnp.float32)
    sums = jnp.einsum("nk,ne->ke", chosen, vectors, precision=jax.lax.Precision.HIGHEST)
    return Statistics(chosen.sum(axis=0), sums)


def means(codebook: jax.Array, statistics: Statistics) -> jax.Array:
    """The codes' mean vectors [K, E] on the unit sphere; codes without vectors stay as they are."""
    return jnp.where(statistics.counts[:, None] > 0, normalize(statistics.sums), codebook)


def follow(codebook: dict, statistics: Statistics, decay: float) -> dict:
    """The codebook after a training step, a moving average of the codes' means and counts.

    Args:
      codebook: {"vectors": float32 [K, E], "usage": float32 [K]}.
      statistics: of the global batch, tokens chosen before this update.
      decay: share of the old values that stays; 0.99 in the published recipe.
    """
    moved = decay * codebook["vectors"] + (1 - decay) * means(codebook["vectors"], statistics)
    usage = decay * codebook["usage"] + (1 - decay) * statistics.counts
    return {"vectors": normalize(moved), "usage": usage}


def kmeans(vectors: jax.Array, starts: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Cosine k-means, which the codebook may start from.

    Args:
      vectors: [..., E], of any lengths.
      starts: float32 [K, E] on the unit sphere, such as K of the vectors.
      iterations: 10 in the published recipe.

    Returns:
      Means float32 [K, E] on the unit sphere, where empty clusters keep their old mean, and the
      number of vectors float32 [K] that the last iteration averaged.
    """
    vectors = normalize(vectors)

    def iteration(_, state):
        centres, _ = state
        found = statistics(vectors, nearest(vectors, centres), len(starts))
        return means(centres, found), found.counts

    start = (starts.astype(jnp.float32), jnp.zeros(len(starts), jnp.float32))
    return jax.lax.fori_loop(0, iterations, iteration, start)


def candidates(normalized: jax.Array, keys: jax.Array, slots: int) -> Candidates:
    """One of the vectors [B, n, E] of each row, in a slot; both are drawn by the row's key [B].

    With as many slots as rows in the global batch, about 37 % (1/e) of the rows are alone in one.
    """
    vectors = jax.lax.stop_gradient(normalized)

    def draw(key):
        place, slot = jax.random.split(key)
        return (
            jax.random.randint(place, (), 0, vectors.shape[1]),
            jax.random.randint(slot, (), 0, slots),
        )

    place, slot = jax.vmap(draw)(keys)
    chosen = jnp.take_along_axis(vectors, place[:, None, None], axis=1)[:, 0]
    return Candidates(
        jnp.zeros((slots, vectors.shape[-1])).at[slot].add(chosen),
        jnp.zeros(slots).at[slot].add(1.0),
    )


def restart(codebook: jax.Array, dead: jax.Array, found: Candidates) -> tuple[jax.Array, jax.Array]:
    """Puts dead codes where vectors are: the first dead code on the first candidate, and so on.

    The official code has no such thing: its unused codes stay where they are for ever.

    Args:
      codebook: float32 [K, E].
      dead: bool [K].
      found: of the global batch.

    Returns:
      the codebook, and bool [K], the codes that were moved: not more than there are candidates.
    """
    usable = found.rows == 1
    order = jnp.argsort(~usable, stable=True)  # usable slots first, each kind in its order
    rank = jnp.cumsum(dead) - 1  # of a code among the dead ones
    moved = dead & (rank < usable.sum())
    chosen = found.vectors[order[jnp.clip(rank, 0, len(order) - 1)]]
    return jnp.where(moved[:, None], chosen, codebook), moved
