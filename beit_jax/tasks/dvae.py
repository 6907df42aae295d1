"""Training the discrete VAE: an image becomes a grid of K codes and comes back.

Loss (Ramesh et al. 2021, eq. 1 and appendix A.2): the negative evidence bound with a logit-Laplace
likelihood, a Gumbel-softmax relaxation of the codes, and a KL to the uniform prior. The whole
bound is divided by the H*W*channels pixel values of an image, so a token's KL (nats) counts
beta / 192 for 8x8 patches of 3 channels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import losses
from beit_jax.architecture import images_of, make_dvae
from beit_jax.augment import color_jitter, to_unit
from beit_jax.data.pipeline import View
from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.models.dvae import DVAE, map_pixels, mean_pixels, unmap_pixels
from beit_jax.task import Purpose, Task, Weights, example_weights, keys_for, mean_of_sums
from beit_jax.tasks import codebook
from beit_jax.tokenizer import decode_tokens


class Training(NamedTuple):
    """The dVAE, its schedules, and the task's functions over them."""

    model: DVAE
    temperature: Callable[[jax.Array], jax.Array]
    kl_weight: Callable[[jax.Array], jax.Array]
    config: ConfigDict

    def init(self, key):
        pixels = jnp.zeros(images_of(self.config).shape)
        return self.model.init(key, pixels)["params"], {}

    def loss_fn(self, params, model_state, frozen, batch, keys, step):
        images = to_unit(batch["image"])
        if strength := self.config.data.color_jitter:
            (images,) = color_jitter(keys_for(keys, Purpose.JITTER), (images,), strength)
        pixels = map_pixels(images)
        logits = self.model.apply({"params": params}, pixels, method="encode")
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(
            keys_for(keys, Purpose.GUMBEL)
        )
        codes = jax.nn.softmax((logits + noise) / self.temperature(step))
        weight, beta = example_weights(batch), self.kl_weight(step)
        sums = self.sums(params, pixels, logits, codes, beta, weight)
        return sums["loss"], ({}, sums)

    def eval_fn(self, params, model_state, frozen, batch, keys):
        pixels = map_pixels(to_unit(batch["image"]))
        logits = self.model.apply({"params": params}, pixels, method="encode")
        codes = jax.nn.one_hot(logits.argmax(-1), self.model.vocabulary)
        beta = self.config.dvae.kl_weight
        return self.sums(params, pixels, logits, codes, beta, example_weights(batch))

    def predict(self, weights: Weights, batch):
        """Hard tokens int32 [B, h, w] and their pictures [B, H, W, channels] in [0, 1]."""
        pixels = map_pixels(to_unit(batch["image"]))
        logits = self.model.apply({"params": weights.params}, pixels, method="encode")
        tokens = logits.argmax(-1)
        return tokens, mean_pixels(decode_tokens(self.model, weights.params, tokens))

    def sums(self, params, pixels, logits, codes, beta, weight):
        """Sums over images of the bound's parts; `codes` [B, h, w, K] are what is decoded."""
        stats = self.model.apply({"params": params}, codes, method="decode")
        chex.assert_equal_shape_prefix((stats, pixels), 3)
        reconstruction = losses.logit_laplace(stats, pixels).mean((1, 2, 3))
        kl = losses.kl_to_uniform(logits).sum((1, 2)) / pixels[0].size
        chosen = jax.nn.one_hot(logits.argmax(-1), self.model.vocabulary).sum((1, 2))
        error = jnp.square(mean_pixels(stats) - unmap_pixels(pixels)).mean((1, 2, 3))

        def total(x):
            return (x * weight).sum(), weight.sum()

        return {
            "loss": total(reconstruction + beta * kl),
            "reconstruction": total(reconstruction),
            "kl": total(kl),
            "squared_error": total(error),
            "codes": (jnp.einsum("bk,b->k", chosen, weight), weight.sum()),
        }


def build(config, source: Source, run: Path) -> Task:
    """Builds the tokenizer's task; neither labels nor frozen networks are needed."""
    del source, run
    _check(config)
    parts = Training(
        make_dvae(config),
        cosine_ramp(*config.dvae.temperature, config.dvae.temperature_steps),
        cosine_ramp(0.0, config.dvae.kl_weight, config.dvae.kl_steps),
        config,
    )
    return Task(
        views={"image": View(tuple(config.data.image_size), config.data.interpolation)},
        init=parts.init,
        loss_fn=parts.loss_fn,
        eval_fn=parts.eval_fn,
        finalize=finalize,
        frozen={},
        predict=parts.predict,
        schedules={"temperature": parts.temperature, "kl_weight": parts.kl_weight},
        evaluators={
            "reconstruction": codebook.reconstruction_evaluator(
                parts.predict, config.data.eval_split
            )
        },
    )


def finalize(sums) -> dict[str, jax.Array]:
    """Means, and from the code histogram the share of codes used and their perplexity."""
    sums = dict(sums)
    counts, _ = sums.pop("codes")
    return mean_of_sums(sums) | codebook.health(counts)


def cosine_ramp(start: float, end: float, steps: int):
    """A half cosine from `start` to `end` over `steps` updates, constant after them."""

    def value(step):
        share = jnp.clip(step / max(steps, 1), 0, 1)
        return end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * share))

    return value


def _check(config) -> None:
    if config.dvae.vocabulary < 2:
        raise UserError(f"config.dvae.vocabulary={config.dvae.vocabulary} must be at least 2.")
    if min(config.dvae.temperature) <= 0:
        raise UserError("config.dvae.temperature must be above 0 at both ends.")
