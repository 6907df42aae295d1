"""Pictures of tokens: a decoder of pixels for a frozen tokenizer.

BEiT v2's tokenizer imitates features and has no way back to pixels; a decoder trained afterwards
shows what its tokens keep of an image. Loss: the dVAE's reconstruction term (Ramesh et al. 2021,
equation 2), nats per pixel value. The tokenizer is read, never trained, so its tokens stay.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import losses
from beit_jax.architecture import make_pixel_decoder
from beit_jax.augment import color_jitter, to_unit
from beit_jax.data.pipeline import View
from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.models.dvae import Decoder, map_pixels, mean_pixels
from beit_jax.task import Purpose, Task, Weights, example_weights, keys_for, mean_of_sums
from beit_jax.tasks import codebook
from beit_jax.tokenizer import Tokenizer, frozen_tokenizer, one_hot


class Decoding(NamedTuple):
    """The decoder, its tokenizer, and the task's functions over them."""

    decoder: Decoder
    tokenizer: Tokenizer
    config: ConfigDict

    def init(self, key):
        tokens = jnp.zeros((1, 1, 1), jnp.int32)
        return self.decoder.init(key, self.codes(tokens))["params"], {}

    def loss_fn(self, params, model_state, frozen, batch, keys, step):
        images = to_unit(batch["image"])
        if strength := self.config.data.color_jitter:
            (images,) = color_jitter(keys_for(keys, Purpose.JITTER), (images,), strength)
        sums = self.sums(params, frozen, images, example_weights(batch))
        return sums["loss"], ({}, sums)

    def eval_fn(self, params, model_state, frozen, batch, keys):
        return self.sums(params, frozen, to_unit(batch["image"]), example_weights(batch))

    def predict(self, weights: Weights, batch):
        """Tokens int32 [B, h, w] and their pictures [B, H, W, channels] in [0, 1]."""
        tokens = self.tokenizer.tokens(weights.frozen, to_unit(batch["image"]))
        return tokens, mean_pixels(
            self.decoder.apply({"params": weights.params}, self.codes(tokens))
        )

    def codes(self, tokens):
        return one_hot(tokens, self.tokenizer.vocabulary)

    def sums(self, params, frozen, images, weight):
        """Sums over images [B, H, W, ch] in [0, 1] of means over pixel values."""
        tokens = self.tokenizer.tokens(frozen, images)
        statistics = self.decoder.apply({"params": params}, self.codes(tokens))
        reconstruction = losses.logit_laplace(statistics, map_pixels(images)).mean((1, 2, 3))
        error = jnp.square(mean_pixels(statistics) - images).mean((1, 2, 3))
        counts = jnp.zeros(self.tokenizer.vocabulary).at[tokens].add(weight[:, None, None])
        return {
            "loss": ((reconstruction * weight).sum(), weight.sum()),
            "squared_error": ((error * weight).sum(), weight.sum()),
            "codes": (counts, weight.sum()),
        }


def build(config, source: Source, run: Path) -> Task:
    """Builds the decoder's task on a frozen tokenizer; labels are not needed."""
    del source
    tokenizer, copies = frozen_tokenizer(config, run)
    _check(config, tokenizer)
    parts = Decoding(make_pixel_decoder(config, tokenizer.vocabulary), tokenizer, config)
    split = config.data.eval_split
    return Task(
        views={"image": View(tuple(config.data.image_size), tokenizer.interpolation)},
        init=parts.init,
        loss_fn=parts.loss_fn,
        eval_fn=parts.eval_fn,
        finalize=finalize,
        frozen=tokenizer.variables,
        copies=copies,
        predict=parts.predict,
        evaluators={
            "codes": codebook.gallery_evaluator(lambda *given: parts.predict(*given)[0], split),
            "reconstruction": codebook.reconstruction_evaluator(parts.predict, split),
        },
    )


def finalize(sums) -> dict[str, jax.Array]:
    """Means, and how the tokenizer's codes are used."""
    sums = dict(sums)
    counts, _ = sums.pop("codes")
    return mean_of_sums(sums) | codebook.health(counts)


def _check(config, tokenizer: Tokenizer) -> None:
    """Refuses a decoder that does not fit the tokenizer's grid."""
    size, factor = tuple(config.data.image_size), tokenizer.factor
    if 2 ** (config.dvae.groups - 1) != factor:
        fits = factor & (factor - 1) == 0
        advice = f"give --config.dvae.groups={factor.bit_length()}" if fits else "no decoder fits"
        raise UserError(
            f"A token of {tokenizer.source} stands for {factor}x{factor} pixels, but the "
            f"decoder's config.dvae.groups={config.dvae.groups} make "
            f"{2 ** (config.dvae.groups - 1)} pixels of one each way; {advice}."
        )
    grid = tokenizer.grid or (size[0] // factor, size[1] // factor)
    if size != (grid[0] * factor, grid[1] * factor):
        raise UserError(
            f"config.data.image_size={size}, but the tokenizer at {tokenizer.source} takes "
            f"images of {grid[0] * factor}x{grid[1] * factor}; give this size."
        )
