"""A frozen tokenizer: images to a grid of tokens and, where it has a decoder of pixels, back.

One face for every tokenizer that a run's folder can hold, trained here or imported.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beit_jax import checkpoint, losses
from beit_jax.architecture import make_dvae, make_vqkd, patch_grid
from beit_jax.errors import UserError
from beit_jax.models import vqkd
from beit_jax.models.dvae import DVAE, map_pixels, unmap_pixels

Variables = Any  # a network's collections: "params" and whatever else it keeps


class Tokenizer(NamedTuple):
    """Pure functions of frozen weights, which are their first argument and never closed over.

    Attributes:
      variables: the weights.
      vocabulary: K, the number of codes.
      factor: pixels of its view that a token stands for, each way.
      grid: tokens down and across, where its positions are for one grid alone; else None.
      tokens: `(variables, images [B, H, W, ch] in [0, 1]) -> int32 [B, h, w]`.
      pictures: `(variables, int32 [B, h, w]) -> [B, H, W, ch] in [0, 1]`, or None.
      nats: `(variables, int32 [B, h, w], images) -> float32 [B]`, -log p(image | tokens) summed
        over the pixel values, or None.
    """

    variables: Variables
    vocabulary: int
    factor: int
    grid: tuple[int, int] | None
    tokens: Callable[[Variables, jax.Array], jax.Array]
    pictures: Callable[[Variables, jax.Array], jax.Array] | None
    nats: Callable[[Variables, jax.Array, jax.Array], jax.Array] | None


def from_weights(weights: checkpoint.Weights, named: str) -> Tokenizer:
    """The tokenizer of a run's folder.

    Args:
      weights: read by `checkpoint.load_weights` or `frozen.load`.
      named: who named them, such as "config.tokenizer.path", for the error sentence.
    """
    makers = {"dvae": _dvae, "vqkd": _vqkd}
    task = weights.config["task"]
    if task not in makers:
        raise UserError(
            f"{named}: {weights.source} is of task {task!r}, not a tokenizer; name the folder of "
            f"one ({' or '.join(makers)})."
        )
    return makers[task](weights)


def _dvae(weights: checkpoint.Weights) -> Tokenizer:
    model = make_dvae(weights.config)
    if "encoder" not in weights.params:
        raise UserError(
            f"{weights.source} holds the dVAE's decoder alone; import the encoder with it, since "
            "tokens come from there."
        )

    def tokens(variables, images):
        return model.apply(variables, map_pixels(images), method="encode").argmax(-1)

    def pictures(variables, tokens):
        return decode_tokens(model, variables["params"], tokens)

    def nats(variables, tokens, images):
        statistics = _statistics(model, variables["params"], tokens)
        return losses.logit_laplace(statistics, map_pixels(images)).sum((1, 2, 3))

    decodes = "decoder" in weights.params
    return Tokenizer(
        variables=weights.variables,
        vocabulary=model.vocabulary,
        factor=2 ** (model.groups - 1),
        grid=None,
        tokens=tokens,
        pictures=pictures if decodes else None,
        nats=nats if decodes else None,
    )


def _vqkd(weights: checkpoint.Weights) -> Tokenizer:
    model = make_vqkd(weights.config)

    def tokens(variables, images):
        return model.apply(variables, vqkd.map_pixels(images), method="tokens")

    return Tokenizer(
        variables=weights.variables,
        vocabulary=model.codes,
        factor=model.encoder.patch_size,
        grid=patch_grid(weights.config),
        tokens=tokens,
        pictures=None,
        nats=None,
    )


def decode_tokens(model: DVAE, params, tokens: jax.Array) -> jax.Array:
    """A dVAE's pictures [B, H, W, channels] in [0, 1] of tokens int32 [B, h, w]."""
    statistics = _statistics(model, params, tokens)
    return unmap_pixels(jax.nn.sigmoid(statistics[..., : model.channels]))


def _statistics(model: DVAE, params, tokens: jax.Array) -> jax.Array:
    codes = jax.nn.one_hot(tokens, model.vocabulary, dtype=jnp.float32)
    return model.apply({"params": params}, codes, method="decode")
