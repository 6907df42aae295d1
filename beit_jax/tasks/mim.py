"""BEiT pre-training: predict the tokenizer's codes of the masked patches (Bao et al. 2022).

A crop is seen by the encoder and, at another size, by the tokenizer, whose grid of codes lines up
with the encoder's grid of patches.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import attention, feature_scores, masking
from beit_jax.architecture import images_of, make_masked_image_model
from beit_jax.augment import color_jitter, normalize, to_unit
from beit_jax.data.pipeline import View
from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.models.beit import MaskedImageModel
from beit_jax.models.layers import at_tokens
from beit_jax.pictures import picture_rows
from beit_jax.task import Purpose, Task, Weights, example_weights, keys_for, row_keys
from beit_jax.tasks.targets import Pixels, Tokens
from beit_jax.tokenizer import Tokenizer, frozen_tokenizer


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
    target: Tokens | Pixels
    grid: tuple[int, int]
    num_masked: int
    config: ConfigDict

    def init(self, key):
        images = jnp.zeros(images_of(self.config).shape)
        indices = jnp.arange(self.num_masked)[None]
        return self.model.init(key, images, indices)["params"], {}

    def views(self, batch):
        """The host's views of each crop, [B, H, W, channels] in [0, 1]."""
        return {name: to_unit(batch[name]) for name in ("image", *self.target.views)}

    def loss_fn(self, params, model_state, frozen, batch, keys, step):
        views = self.views(batch)
        if strength := self.config.data.color_jitter:
            jittered = color_jitter(keys_for(keys, Purpose.JITTER), [*views.values()], strength)
            views = dict(zip(views, jittered, strict=True))
        masked = self.masked_indices(keys)
        read = masked if self.config.mim.predict == "masked" else self.all_indices(masked)
        labels = self.target.labels(frozen, views, read)
        drop_keys = keys_for(keys, Purpose.DROP_PATH)
        heads = self.heads(params, views["image"], masked, drop_keys, read)
        sums = self.sums(heads, labels, example_weights(batch))
        return sums["loss"], ({}, sums)

    def eval_fn(self, params, model_state, frozen, batch, keys):
        """Of the masked patches, whatever training counts, so that runs compare."""
        weight, views = example_weights(batch), self.views(batch)
        masked = self.masked_indices(keys)
        every_label = self.target.labels(frozen, views)
        labels = at_tokens(every_label, masked)
        heads = self.heads(params, views["image"], masked)
        nats = self.target.loss(heads[0], labels).sum(1)
        return {
            **self.sums(heads, labels, weight),
            **self.target.bound(frozen, views, every_label, nats, weight),
            "masked_patches": (self.num_masked * weight.sum(), weight.sum()),
        }

    def predict(self, weights: Weights, batch):
        """Masked images, and the target's pictures of the true labels and of predicted ones."""
        params, _, frozen = weights
        views = self.views(batch)
        masked = self.held_out_indices(batch)
        labels = self.target.labels(frozen, views)
        rows = jnp.arange(len(labels))[:, None]
        guessed = self.target.guess(self.heads(params, views["image"], masked)[0])
        true, predicted = (
            self.target.pictures(frozen, found)
            for found in (labels, labels.at[rows, masked].set(guessed))
        )
        return self.masked(weights, batch), true, predicted

    def masked(self, weights: Weights, batch):
        """Images [B, H, W, ch] in [0, 1] as the encoder sees them: masked patches are grey."""
        del weights
        images, masked = to_unit(batch["image"]), self.held_out_indices(batch)
        rows, patch = jnp.arange(len(images))[:, None], self.config.model.patch_size
        hidden = jnp.zeros((len(images), self.grid[0] * self.grid[1])).at[rows, masked].set(1.0)
        hidden = hidden.reshape(-1, *self.grid)
        hidden = hidden.repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
        return images * (1 - hidden) + 0.5 * hidden

    def held_out_indices(self, batch):
        """The masked patches int32 [B, M] of an evaluation's batch, for ever the same."""
        return self.masked_indices(row_keys(self.config.seed, 0, batch["index"]))

    @jax.named_scope("masking")
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

    def all_indices(self, masked):
        """Every patch int32 [B, N] of as many images as `masked` [B, M]."""
        number = self.grid[0] * self.grid[1]
        return jnp.broadcast_to(jnp.arange(number), (len(masked), number))

    def heads(self, params, images, masked, drop_keys=None, read=None):
        """What each head says [B, M, outputs], from images in [0, 1] with the patches `masked`.

        `drop_keys` [B] may drop paths; `read` names other patches whose outputs are wanted.
        """
        images = normalize(images, self.config.model.mean, self.config.model.std)
        return self.model.apply({"params": params}, images, masked, drop_keys, read)

    def sums(self, heads, labels, weight):
        """Sums over patches; `weight` [B] counts images, or leaves padding out.

        `loss` is the sum of all heads' losses; with a CLS branch each is also given apart.
        """
        weights = jnp.broadcast_to(weight[:, None], labels.shape[:2])
        count = weights.sum()
        loss = [(self.target.loss(head, labels) * weights).sum() for head in heads]
        sums = {"loss": (sum(loss), count), **self.target.scores(heads, labels, weights)}
        if len(heads) > 1:
            sums["final_loss"], sums["cls_loss"] = (loss[0], count), (loss[1], count)
        return sums


def build(config, source: Source, run: Path) -> Task:
    """Builds masked image modelling on a frozen tokenizer's codes, or on pixels."""
    target, copies = _target(config, patch_grid(config), run)
    return assemble(config, source, target, copies)


def assemble(config, source: Source, target: Tokens | Pixels, copies) -> Task:
    """Builds masked image modelling of a target; `copies` are the networks that the run keeps."""
    grid = patch_grid(config)
    num_masked = masking.num_masked_patches(
        config.mask.share,
        grid,
        kind=config.mask.kind,
        min_block=config.mask.min_block,
        aspect=config.mask.aspect,
    )
    model = make_masked_image_model(config, target.outputs)
    parts = Pretraining(model, target, grid, num_masked, config)
    evaluators = {"pictures": _picture_evaluator(parts, config)}
    if config.eval.attention:
        evaluators["attention"] = attention.make_evaluator(config)
    if config.eval.knn or config.eval.probe:
        evaluators["features"] = feature_scores.make_evaluator(config, source)
    return Task(
        views={
            "image": View(tuple(config.data.image_size), config.data.interpolation),
            **target.views,
        },
        init=parts.init,
        loss_fn=parts.loss_fn,
        eval_fn=parts.eval_fn,
        finalize=target.finalize,
        frozen=target.variables,
        copies=copies,
        predict=parts.predict,
        evaluators=evaluators,
    )


def _target(config, grid: tuple[int, int], run: Path):
    """What is predicted, and the copies that the run is to keep."""
    for key, known in (("predict", ("masked", "all")), ("target", ("tokens", "pixels"))):
        if config.mim[key] not in known:
            raise UserError(
                f"config.mim.{key}={config.mim[key]!r} is unknown; choose {' or '.join(known)}."
            )
    if config.mim.target == "pixels":
        model, channels = config.model, config.data.channels
        return Pixels(model.patch_size, grid, channels, model.mean, model.std), {}
    tokenizer, copies = frozen_tokenizer(config, run)
    if tokenizer.grid not in (None, grid):
        theirs, ours = (f"{height}x{width}" for height, width in (tokenizer.grid, grid))
        raise UserError(
            f"The tokenizer at {tokenizer.source} gives {theirs} tokens, but "
            f"config.data.image_size and config.model.patch_size make {ours} patches; change them "
            "or take a tokenizer for that grid."
        )
    return tokens_of(config, tokenizer), copies


def tokens_of(config, tokenizer: Tokenizer) -> Tokens:
    """A tokenizer's codes as what the config's encoder predicts."""
    return Tokens(tokenizer, patch_grid(config), tuple(config.data.image_size))


def _picture_evaluator(parts: Pretraining, config):
    """Rows: original, masked, pictures of the true labels, those with the predicted ones.

    The latter two only where the target can be drawn.
    """
    draw = jax.jit(parts.predict if parts.target.pictures else parts.masked)

    def evaluator(weights, batches):
        batch = next(batches(config.data.eval_split))
        images = to_unit(batch["image"])
        if not parts.target.pictures:
            return {}, {"masks": picture_rows(images, draw(weights, batch))}
        masked, true, predicted = draw(weights, batch)
        if true.shape != images.shape:
            true, predicted = (
                jax.image.resize(x, images.shape, "linear") for x in (true, predicted)
            )
        return {}, {"reconstruction": picture_rows(images, masked, true, predicted)}

    return evaluator
