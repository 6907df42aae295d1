"""A frozen tokenizer: images to a grid of tokens and, where it has a decoder of pixels, back.

One face for every tokenizer that a run's folder can hold, trained here or imported.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beit_jax import checkpoint, losses
from beit_jax.architecture import make_dvae, make_pixel_decoder, make_vqkd, patch_grid
from beit_jax.errors import UserError
from beit_jax.frozen import frozen_network
from beit_jax.models import vqkd
from beit_jax.models.dvae import DVAE, map_pixels, mean_pixels

Variables = Any  # a network's collections: "params" and whatever else it keeps


class Tokenizer(NamedTuple):
    """Pure functions of frozen weights, which are their first argument and never closed over.

    Attributes:
      source: where the weights were read, for sentences.
      variables: the weights.
      vocabulary: K, the number of codes.
      factor: pixels of its view that a token stands for, each way.
      grid: tokens down and across, where its positions are for one grid alone; else None.
      channels: of its images.
      interpolation: that resized the images it was trained on, so for its view too.
      tokens: `(variables, images [B, H, W, ch] in [0, 1], read=None) -> int32 [B, h, w]`; with
        `read` int32 [B, M] those of these positions in the row-major grid alone: [B, M].
      pictures: `(variables, int32 [B, h, w]) -> [B, H, W, ch] in [0, 1]`, or None.
      nats: `(variables, int32 [B, h, w], images) -> float32 [B]`, -log p(image | tokens) summed
        over the pixel values, or None.
    """

    source: str
    variables: Variables
    vocabulary: int
    factor: int
    grid: tuple[int, int] | None
    channels: int
    interpolation: str
    tokens: Callable[..., jax.Array]
    pictures: Callable[[Variables, jax.Array], jax.Array] | None
    nats: Callable[[Variables, jax.Array, jax.Array], jax.Array] | None


def frozen_tokenizer(config, run: Path) -> tuple[Tokenizer, dict[str, checkpoint.Weights]]:
    """The tokenizer that a run reads, from its own copy or `config.tokenizer.path`.

    Returns:
      the tokenizer, and what is to be kept of it; see `frozen.frozen_network`.
    """

    def make(weights: checkpoint.Weights, named: str) -> Tokenizer:
        return from_weights(weights, named, config.model.dtype)

    advice = (
        "a tokenizer is needed; train one with `python -m beit_jax.main --config=configs/dvae.py` "
        "and give its run folder, --config.tokenizer.path=runs/dvae."
    )
    found, copies = frozen_network(run, "tokenizer", config.tokenizer.path, make, advice)
    if found.channels != config.data.channels:
        raise UserError(
            f"The tokenizer at {found.source} was trained on {found.channels} channels, but "
            f"config.data.channels={config.data.channels}; train a tokenizer for these channels."
        )
    return found, copies


def from_weights(weights: checkpoint.Weights, named: str, dtype: str) -> Tokenizer:
    """The tokenizer of a run's folder.

    Args:
      weights: read by `frozen.read` or `frozen.load`.
      named: who named them, such as "config.tokenizer.path", for the error sentence.
      dtype: what the networks compute in; a dVAE's logits, and VQ-KD's projection to code width
        and its distances, are float32 all the same.
    """
    makers = {"dvae": _dvae, "vqkd": _vqkd, "pixel_decoder": _pixel_decoder}
    config = weights.config
    if config["task"] not in makers:
        raise UserError(
            f"{named}: {weights.source} is of task {config['task']!r}, not a tokenizer; name the "
            f"folder of one ({', '.join(makers)})."
        )
    computed = {key: {**config[key], "dtype": dtype} for key in ("model", "dvae")}
    return makers[config["task"]](weights._replace(config={**config, **computed}))


def _dvae(weights: checkpoint.Weights) -> Tokenizer:
    model = make_dvae(weights.config)
    if "encoder" not in weights.params:
        raise UserError(
            f"{weights.source} holds the dVAE's decoder alone; import the encoder with it, since "
            "tokens come from there."
        )

    def tokens(variables, images, read=None):
        return model.apply(variables, map_pixels(images), read, method="encode").argmax(-1)

    def statistics(variables, tokens):
        return decode_tokens(model, variables["params"], tokens)

    pictures, nats = _of_pixels(statistics) if "decoder" in weights.params else (None, None)
    return Tokenizer(
        source=weights.source,
        variables=weights.variables,
        vocabulary=model.vocabulary,
        factor=2 ** (model.groups - 1),
        grid=None,
        channels=weights.config["data"]["channels"],
        interpolation=weights.config["data"]["interpolation"],
        tokens=tokens,
        pictures=pictures,
        nats=nats,
    )


def _vqkd(weights: checkpoint.Weights) -> Tokenizer:
    model = make_vqkd(weights.config)

    def tokens(variables, images, read=None):
        return model.apply(variables, vqkd.map_pixels(images), read, method="tokens")

    return Tokenizer(
        source=weights.source,
        variables=weights.variables,
        vocabulary=model.codes,
        factor=model.encoder.patch_size,
        grid=patch_grid(weights.config),
        channels=weights.config["data"]["channels"],
        interpolation=weights.config["data"]["interpolation"],
        tokens=tokens,
        pictures=None,
        nats=None,
    )


def _pixel_decoder(weights: checkpoint.Weights) -> Tokenizer:
    """The tokenizer whose tokens the run learnt to decode, with that decoder."""
    tokenizer = from_weights(
        weights.parts["tokenizer"], weights.source, weights.config["model"]["dtype"]
    )
    decoder = make_pixel_decoder(weights.config, tokenizer.vocabulary)

    def tokens(variables, images, read=None):
        return tokenizer.tokens(variables["tokenizer"], images, read)

    def statistics(variables, tokens):
        codes = one_hot(tokens, tokenizer.vocabulary)
        return decoder.apply({"params": variables["decoder"]}, codes)

    pictures, nats = _of_pixels(statistics)
    variables = {"tokenizer": tokenizer.variables, "decoder": weights.params}
    return tokenizer._replace(
        source=weights.source, variables=variables, tokens=tokens, pictures=pictures, nats=nats
    )


def decode_tokens(model: DVAE, params, tokens: jax.Array) -> jax.Array:
    """A dVAE's statistics [B, H, W, 2 * channels] of tokens int32 [B, h, w]."""
    codes = one_hot(tokens, model.vocabulary)
    return model.apply({"params": params}, codes, method="decode")


def one_hot(tokens: jax.Array, vocabulary: int) -> jax.Array:
    """Tokens int32 [B, h, w] as codes float32 [B, h, w, K], which decoders of pixels take."""
    return jax.nn.one_hot(tokens, vocabulary, dtype=jnp.float32)


def _of_pixels(statistics: Callable[[Variables, jax.Array], jax.Array]):
    """`pictures` and `nats` of a tokenizer, from its decoder's statistics of tokens."""

    def pictures(variables, tokens):
        return mean_pixels(statistics(variables, tokens))

    def nats(variables, tokens, images):
        return losses.logit_laplace(statistics(variables, tokens), map_pixels(images)).sum(
            (1, 2, 3)
        )

    return pictures, nats
