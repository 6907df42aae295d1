"""BEiT pre-training: predict the tokenizer's codes of the masked patches (Bao et al. 2022).

Each image is seen in two views of one crop: the encoder's, and the tokenizer's, whose grid of codes
lines up with the encoder's grid of patches.
"""

from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import checkpoint, features, losses, masking
from beit_jax.architecture import images_of, make_masked_image_model
from beit_jax.augment import color_jitter, normalize, to_unit
from beit_jax.data.pipeline import View
from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.frozen import frozen_network
from beit_jax.models.beit import MaskedImageModel
from beit_jax.pictures import picture_rows
from beit_jax.task import (
    Purpose,
    Task,
    Weights,
    example_weights,
    keys_for,
    mean_of_sums,
    row_keys,
)
from beit_jax.tokenizer import Tokenizer, from_weights


def patch_grid(config) -> tuple[int, int]:
    """Patches down and across; refuses sizes that do not divide."""
    (height, width), patch = config.data.image_size, config.model.patch_size
    if height % patch or width % patch:
        raise UserError(
            f"config.data.image_size={(height, width)} is not a multiple of "
            f"config.model.patch_size={patch}; change one of them."
        )
    return height // patch, width // patch


class Pretraining(NamedTuple):
    """The parts of masked image modelling, and the task's functions over them."""

    model: MaskedImageModel
    tokenizer: Tokenizer
    grid: tuple[int, int]
    num_masked: int
    config: ConfigDict

    def init(self, key):
        images = jnp.zeros(images_of(self.config).shape)
        indices = jnp.arange(self.num_masked)[None]
        return self.model.init(key, images, indices)["params"], {}

    def loss_fn(self, params, model_state, frozen, batch, keys, step):
        views = (to_unit(batch["image"]), to_unit(batch["token_image"]))
        if strength := self.config.data.color_jitter:
            views = color_jitter(keys_for(keys, Purpose.JITTER), views, strength)
        images, token_images = views
        indices = self.masked_indices(keys)
        labels = jnp.take_along_axis(self.tokens(frozen, token_images), indices, axis=1)
        logits = self.logits(params, images, indices, keys_for(keys, Purpose.DROP_PATH))
        sums = self.sums(logits, labels, example_weights(batch))
        return sums["loss"], ({}, sums)

    def eval_fn(self, params, model_state, frozen, batch, keys):
        weight = example_weights(batch)
        token_images = to_unit(batch["token_image"])
        tokens = self.tokens(frozen, token_images)
        indices = self.masked_indices(keys)
        labels = jnp.take_along_axis(tokens, indices, axis=1)
        logits = self.logits(params, to_unit(batch["image"]), indices)
        token_nats = losses.cross_entropy(logits[0], labels).sum(1)
        count = weight.sum()
        sums = self.sums(logits, labels, weight) | {
            "masked_token_nats": ((token_nats * weight).sum(), count),
            "masked_patches": (self.num_masked * count, count),
        }
        if self.tokenizer.nats is None:
            return sums
        nats = self.tokenizer.nats(frozen, tokens.reshape(-1, *self.grid), token_images)
        return sums | {
            # The two-stage evidence bound of the paper's section 2.5, per image, in nats.
            "reconstruction_nats": ((nats * weight).sum(), count),
            "evidence_bound": (-((nats + token_nats) * weight).sum(), count),
        }

    def predict(self, weights: Weights, batch):
        """Masked images, and the tokenizer's pictures of true tokens and of predicted ones."""
        params, _, frozen = weights
        images = to_unit(batch["image"])
        indices = self.masked_indices(row_keys(self.config.seed, 0, batch["index"]))
        tokens = self.tokens(frozen, to_unit(batch["token_image"]))
        rows = jnp.arange(len(tokens))[:, None]
        filled = tokens.at[rows, indices].set(self.logits(params, images, indices)[0].argmax(-1))
        mask = jnp.zeros(tokens.shape).at[rows, indices].set(1.0).reshape(-1, *self.grid)
        patch = self.config.model.patch_size
        mask = mask.repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
        true, predicted = (
            self.tokenizer.pictures(frozen, t.reshape(-1, *self.grid)) for t in (tokens, filled)
        )
        return images * (1 - mask) + 0.5 * mask, true, predicted

    def tokens(self, frozen, token_images):
        """Hard tokens int32 [B, N] of images [B, H', W', channels] in [0, 1]."""
        codes = self.tokenizer.tokens(frozen, token_images)
        chex.assert_shape(codes, (None, *self.grid))  # one token a patch
        return codes.reshape(len(codes), -1)

    def masked_indices(self, keys):
        """The masked patches int32 [B, M] that the rows' keys [B] draw."""
        rule = self.config.mask

        def draw(key):
            if rule.kind == "random":
                mask = masking.random_mask(key, self.grid, self.num_masked)
            else:
                mask = masking.blockwise_mask(
                    key, self.grid, self.num_masked, min_block=rule.min_block, aspect=rule.aspect
                )
            return masking.masked_indices(mask, self.num_masked)

        return jax.vmap(draw)(keys_for(keys, Purpose.MASK))

    def logits(self, params, images, indices, drop_keys=None):
        """Logits [B, M, K] of each head, from images in [0, 1]; `drop_keys` [B] may drop paths."""
        images = normalize(images, self.config.model.mean, self.config.model.std)
        return self.model.apply({"params": params}, images, indices, drop_keys)

    def sums(self, logits, labels, weight):
        """Sums over the masked tokens; `weight` [B] counts images, or leaves padding out.

        `loss` is the sum of all heads' losses; with a CLS branch each is also given apart.
        """
        weights = jnp.broadcast_to(weight[:, None], labels.shape)
        count = weights.sum()
        histogram = jnp.zeros(self.tokenizer.vocabulary).at[labels].add(weights)
        chex.assert_equal_shape_prefix((*logits, labels), 2)
        loss = [(losses.cross_entropy(head, labels) * weights).sum() for head in logits]
        hits = [((head.argmax(-1) == labels) * weights).sum() for head in logits]
        sums = {
            "loss": (sum(loss), count),
            "accuracy": (hits[0], count),
            "guess_accuracy": (histogram, count),
        }
        if len(logits) > 1:
            sums["final_loss"], sums["cls_loss"] = (loss[0], count), (loss[1], count)
            sums["cls_accuracy"] = (hits[1], count)
        return sums


def build(config, source: Source, run: Path) -> Task:
    """Builds masked image modelling on a frozen tokenizer's codes."""
    grid = patch_grid(config)
    num_masked = masking.num_masked_patches(
        config.mask.share,
        grid,
        kind=config.mask.kind,
        min_block=config.mask.min_block,
        aspect=config.mask.aspect,
    )
    tokenizer, copies = _tokenizer(config, grid, run)
    model = make_masked_image_model(config, tokenizer.vocabulary)
    parts = Pretraining(model, tokenizer, grid, num_masked, config)
    evaluators = {}
    if tokenizer.pictures is not None:
        evaluators["reconstruction"] = _picture_evaluator(parts.predict, config)
    if config.eval.knn or config.eval.probe:
        evaluators["features"] = features.make_evaluator(config, source.class_names)
    token_size = (grid[0] * tokenizer.factor, grid[1] * tokenizer.factor)
    return Task(
        views={
            "image": View(tuple(config.data.image_size), config.data.interpolation),
            "token_image": View(token_size, config.tokenizer.interpolation),
        },
        init=parts.init,
        loss_fn=parts.loss_fn,
        eval_fn=parts.eval_fn,
        finalize=finalize,
        frozen=tokenizer.variables,
        copies=copies,
        predict=parts.predict,
        evaluators=evaluators,
    )


def finalize(sums) -> dict[str, jax.Array]:
    """Means; `guess_accuracy` is what always guessing the commonest token would have scored."""
    sums = dict(sums)
    histogram, count = sums["guess_accuracy"]
    return mean_of_sums(sums | {"guess_accuracy": (histogram.max(), count)})


def _tokenizer(config, grid: tuple[int, int], run: Path):
    def make(weights: checkpoint.Weights, named: str) -> Tokenizer:
        channels = weights.config["data"]["channels"]
        if channels != config.data.channels:
            raise UserError(
                f"The tokenizer at {weights.source} was trained on {channels} channels, but "
                f"config.data.channels={config.data.channels}; train a tokenizer for these "
                "channels."
            )
        tokenizer = from_weights(weights, named)
        if tokenizer.grid not in (None, grid):
            raise UserError(
                f"The tokenizer at {weights.source} gives {_by(tokenizer.grid)} tokens, but "
                f"config.data.image_size and config.model.patch_size make {_by(grid)} patches; "
                "change them or take a tokenizer for that grid."
            )
        return tokenizer

    def _by(grid: tuple[int, int]) -> str:
        return f"{grid[0]}x{grid[1]}"

    advice = (
        "pre-training needs a tokenizer; train one with `python -m beit_jax.main "
        "--config=configs/dvae.py` and give its run folder, --config.tokenizer.path=runs/dvae."
    )
    return frozen_network(run, "tokenizer", config.tokenizer.path, make, advice)


def _picture_evaluator(predict, config):
    """Rows: original, masked, decoded true tokens, decoded tokens with the predicted ones."""
    draw = jax.jit(predict)

    def evaluator(weights, batches):
        batch = next(batches(config.data.eval_split))
        masked, true, predicted = draw(weights, batch)
        images = to_unit(batch["image"])
        if true.shape != images.shape:
            true, predicted = (
                jax.image.resize(x, images.shape, "linear") for x in (true, predicted)
            )
        return {}, {"reconstruction": picture_rows(images, masked, true, predicted)}

    return evaluator
