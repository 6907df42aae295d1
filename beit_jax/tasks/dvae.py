"""Training the discrete VAE: an image becomes a grid of K codes and comes back.

Loss (Ramesh et al. 2021, eq. 1 and appendix A.2): the negative evidence bound with a logit-Laplace
likelihood, a Gumbel-softmax relaxation of the codes, and a KL to the uniform prior. The whole
bound is divided by the H*W*channels pixel values of an image, so a token's KL (nats) counts
beta / 192 for 8x8 patches of 3 channels.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from beit_jax import losses
from beit_jax.augment import color_jitter
from beit_jax.data.pipeline import View
from beit_jax.errors import UserError
from beit_jax.models.dvae import DVAE, map_pixels, unmap_pixels
from beit_jax.pictures import picture_rows
from beit_jax.task import Purpose, Task, example_weights, keys_for, mean_of_sums


def make_model(config: dict) -> DVAE:
    """The network that a resolved config describes."""
    dvae = config["dvae"]
    return DVAE(
        vocabulary=dvae["vocabulary"],
        width=dvae["width"],
        groups=dvae["groups"],
        blocks_per_group=dvae["blocks_per_group"],
        decoder_input=dvae["decoder_input"],
        channels=config["data"]["channels"],
        dtype=jnp.dtype(dvae["dtype"]),
    )


def build(config, class_names: tuple[str, ...], run: Path) -> Task:
    """Builds the tokenizer's task; neither labels nor frozen networks are needed."""
    del class_names, run
    model = make_model(config)
    height, width = config.data.image_size
    channels, vocabulary = config.data.channels, config.dvae.vocabulary
    values = height * width * channels  # pixel values of an image
    temperature = cosine_ramp(*config.dvae.temperature, config.dvae.temperature_steps)
    kl_weight = cosine_ramp(0.0, config.dvae.kl_weight, config.dvae.kl_steps)
    _check(config)

    def init(key):
        pixels = jnp.zeros((1, height, width, channels))
        return model.init(key, pixels)["params"], {}

    def sums(params, pixels, logits, codes, beta, weight):
        """Per-image sums of the bound's parts; `codes` [B, h, w, K] are what the decoder sees."""
        stats = model.apply({"params": params}, codes, method="decode")
        reconstruction = losses.logit_laplace(stats, pixels).mean((1, 2, 3))
        kl = losses.kl_to_uniform(logits).sum((1, 2)) / values
        chosen = jax.nn.one_hot(logits.argmax(-1), vocabulary).sum((1, 2))
        means = jax.nn.sigmoid(stats[..., :channels].astype(jnp.float32))
        error = jnp.square(unmap_pixels(means) - unmap_pixels(pixels)).mean((1, 2, 3))

        def total(x):
            return (x * weight).sum(), weight.sum()

        return {
            "loss": total(reconstruction + beta * kl),
            "reconstruction": total(reconstruction),
            "kl": total(kl),
            "squared_error": total(error),
            "codes": (jnp.einsum("bk,b->k", chosen, weight), weight.sum()),
        }

    def loss_fn(params, model_state, frozen, batch, keys, step):
        images = batch["image"] / 255.0
        if config.data.color_jitter:
            jitter_keys = keys_for(keys, Purpose.JITTER)
            (images,) = color_jitter(jitter_keys, (images,), config.data.color_jitter)
        pixels = map_pixels(images)
        logits = model.apply({"params": params}, pixels, method="encode")
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(
            keys_for(keys, Purpose.GUMBEL)
        )
        codes = jax.nn.softmax((logits + noise) / temperature(step))
        values = sums(params, pixels, logits, codes, kl_weight(step), example_weights(batch))
        return values["loss"], ({}, values)

    def eval_fn(params, model_state, frozen, batch, keys):
        pixels = map_pixels(batch["image"] / 255.0)
        logits = model.apply({"params": params}, pixels, method="encode")
        codes = jax.nn.one_hot(logits.argmax(-1), vocabulary)
        beta = config.dvae.kl_weight
        return sums(params, pixels, logits, codes, beta, example_weights(batch))

    def predict(params, frozen, batch):
        """Hard tokens int32 [B, h, w] and their pictures [B, H, W, channels] in [0, 1]."""
        logits = model.apply(
            {"params": params}, map_pixels(batch["image"] / 255.0), method="encode"
        )
        tokens = logits.argmax(-1)
        return tokens, decode_tokens(model, params, tokens)

    return Task(
        views={"image": View((height, width), config.data.interpolation)},
        init=init,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        finalize=finalize,
        frozen={},
        predict=predict,
        schedules={"temperature": temperature, "kl_weight": kl_weight},
        evaluators={"reconstruction": _picture_evaluator(predict, config.data.eval_split)},
    )


def decode_tokens(model: DVAE, params, tokens: jax.Array) -> jax.Array:
    """Decodes tokens int32 [B, h, w] to pictures [B, H, W, channels] in [0, 1]."""
    codes = jax.nn.one_hot(tokens, model.vocabulary)
    stats = model.apply({"params": params}, codes, method="decode")
    return jnp.clip(unmap_pixels(jax.nn.sigmoid(stats[..., : model.channels])), 0, 1)


def finalize(sums) -> dict[str, jax.Array]:
    """Means, and from the code histogram the share of codes used and their perplexity."""
    sums = dict(sums)
    counts, _ = sums.pop("codes")
    return mean_of_sums(sums) | codebook_health(counts)


def codebook_health(counts: jax.Array) -> dict[str, jax.Array]:
    """Share of the K codes that occur, and exp of the entropy of their frequencies [K]."""
    share = counts / counts.sum()
    entropy = -(share * jnp.log(jnp.where(share > 0, share, 1))).sum()
    return {"usage": (counts > 0).mean(), "perplexity": jnp.exp(entropy)}


def cosine_ramp(start: float, end: float, steps: int):
    """A half cosine from `start` to `end` over `steps` updates, constant after them."""

    def value(step):
        share = jnp.clip(step / max(steps, 1), 0, 1)
        return end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * share))

    return value


def _picture_evaluator(predict, split: str):
    """Originals above their reconstructions from hard tokens."""
    draw = jax.jit(lambda weights, batch: predict(weights.params, weights.frozen, batch)[1])

    def evaluator(weights, batches):
        batch = next(batches(split))
        return {}, {"reconstruction": picture_rows(batch["image"] / 255.0, draw(weights, batch))}

    return evaluator


def _check(config) -> None:
    if config.dvae.vocabulary < 2:
        raise UserError(f"config.dvae.vocabulary={config.dvae.vocabulary} must be at least 2.")
    if min(config.dvae.temperature) <= 0:
        raise UserError("config.dvae.temperature must be above 0 at both ends.")
