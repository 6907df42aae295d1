"""BEiT pre-training: predict the tokenizer's codes of the masked patches (Bao et al. 2022).

Each image is seen in two views of one crop: the encoder's, and the tokenizer's, whose grid of codes
lines up with the encoder's grid of patches.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from beit_jax import checkpoint, features, losses, masking
from beit_jax.augment import color_jitter, normalize
from beit_jax.data.pipeline import View
from beit_jax.errors import UserError
from beit_jax.models.beit import MaskedImageModel
from beit_jax.models.dvae import map_pixels
from beit_jax.pictures import picture_rows
from beit_jax.task import Purpose, Task, example_weights, keys_for, mean_of_sums, row_keys
from beit_jax.tasks import dvae


def patch_grid(config) -> tuple[int, int]:
    """Patches down and across; refuses sizes that do not divide."""
    (height, width), patch = config.data.image_size, config.model.patch_size
    if height % patch or width % patch:
        raise UserError(
            f"config.data.image_size={(height, width)} is not a multiple of "
            f"config.model.patch_size={patch}; change one of them."
        )
    return height // patch, width // patch


def build(config, class_names: tuple[str, ...], run: Path) -> Task:
    """Builds masked image modelling on a frozen tokenizer's codes."""
    grid = patch_grid(config)
    num_masked = masking.num_masked_patches(
        config.mask.share,
        grid,
        kind=config.mask.kind,
        min_block=config.mask.min_block,
        aspect=config.mask.aspect,
    )
    frozen, tokenizer, token_size = _tokenizer(config, grid, run)
    model = MaskedImageModel(encoder=features.make_encoder(config), vocabulary=tokenizer.vocabulary)
    mean, std = config.model.mean, config.model.std

    def init(key):
        images = jnp.zeros((1, *config.data.image_size, config.data.channels))
        indices = jnp.arange(num_masked)[None]
        return model.init(key, images, indices)["params"], {}

    def tokens_of(frozen, token_images):
        logits = tokenizer.apply({"params": frozen}, map_pixels(token_images), method="encode")
        return logits.argmax(-1).reshape(len(logits), -1)

    def masked_indices(keys):
        def draw(key):
            if config.mask.kind == "random":
                mask = masking.random_mask(key, grid, num_masked)
            else:
                mask = masking.blockwise_mask(
                    key,
                    grid,
                    num_masked,
                    min_block=config.mask.min_block,
                    aspect=config.mask.aspect,
                )
            return masking.masked_indices(mask, num_masked)

        return jax.vmap(draw)(keys_for(keys, Purpose.MASK))

    def predictions(params, images, indices, drop_keys=None):
        return model.apply({"params": params}, normalize(images, mean, std), indices, drop_keys)

    def sums(logits, labels, weight):
        per_token = losses.cross_entropy(logits, labels)
        weights = jnp.broadcast_to(weight[:, None], labels.shape)
        count = weights.sum()
        hits = (logits.argmax(-1) == labels) * weights
        histogram = jnp.zeros(tokenizer.vocabulary).at[labels].add(weights)
        return {
            "loss": ((per_token * weights).sum(), count),
            "accuracy": (hits.sum(), count),
            "guess_accuracy": (histogram, count),
        }

    def loss_fn(params, model_state, frozen, batch, keys, step):
        views = (batch["image"] / 255.0, batch["token_image"] / 255.0)
        if config.data.color_jitter:
            views = color_jitter(keys_for(keys, Purpose.JITTER), views, config.data.color_jitter)
        images, token_images = views
        indices = masked_indices(keys)
        labels = jnp.take_along_axis(tokens_of(frozen, token_images), indices, axis=1)
        logits = predictions(params, images, indices, keys_for(keys, Purpose.DROP_PATH))
        values = sums(logits, labels, example_weights(batch))
        return values["loss"], ({}, values)

    def eval_fn(params, model_state, frozen, batch, keys):
        weight = example_weights(batch)
        token_images = batch["token_image"] / 255.0
        tokens = tokens_of(frozen, token_images)
        indices = masked_indices(keys)
        labels = jnp.take_along_axis(tokens, indices, axis=1)
        logits = predictions(params, batch["image"] / 255.0, indices)
        stats = tokenizer.apply(
            {"params": frozen},
            jax.nn.one_hot(tokens.reshape(-1, *grid), tokenizer.vocabulary),
            method="decode",
        )
        nats = losses.logit_laplace(stats, map_pixels(token_images)).sum((1, 2, 3))
        token_nats = losses.cross_entropy(logits, labels).sum(1)
        count = weight.sum()
        return sums(logits, labels, weight) | {
            # The two-stage evidence bound of the paper's section 2.5, per image, in nats.
            "reconstruction_nats": ((nats * weight).sum(), count),
            "masked_token_nats": ((token_nats * weight).sum(), count),
            "evidence_bound": (-((nats + token_nats) * weight).sum(), count),
            "masked_patches": (num_masked * count, count),
        }

    def predict(params, frozen, batch, keys):
        """Masked images, and the tokenizer's pictures of true tokens and of predicted ones."""
        images = batch["image"] / 255.0
        indices = masked_indices(keys)
        tokens = tokens_of(frozen, batch["token_image"] / 255.0)
        rows = jnp.arange(len(tokens))[:, None]
        guesses = predictions(params, images, indices).argmax(-1)
        filled = tokens.at[rows, indices].set(guesses)
        mask = jnp.zeros(tokens.shape).at[rows, indices].set(1.0).reshape(-1, *grid)
        patch = config.model.patch_size
        mask = mask.repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
        pictures = [
            dvae.decode_tokens(tokenizer, frozen, t.reshape(-1, *grid)) for t in (tokens, filled)
        ]
        return images * (1 - mask) + 0.5 * mask, *pictures

    evaluators = {"reconstruction": _picture_evaluator(predict, config)}
    if config.eval.knn or config.eval.probe:
        evaluators["features"] = features.make_evaluator(config, class_names)
    return Task(
        views={
            "image": View(tuple(config.data.image_size), config.data.interpolation),
            "token_image": View(token_size, config.tokenizer.interpolation),
        },
        init=init,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        finalize=finalize,
        frozen=frozen,
        predict=predict,
        evaluators=evaluators,
    )


def finalize(sums) -> dict[str, jax.Array]:
    """Means; `guess_accuracy` is what always guessing the commonest token would have scored."""
    sums = dict(sums)
    histogram, count = sums["guess_accuracy"]
    return mean_of_sums(sums | {"guess_accuracy": (histogram.max(), count)})


def _tokenizer(config, grid: tuple[int, int], run: Path):
    """The frozen tokenizer: its weights, its network and the size of its view (pixels)."""
    folder = run / "frozen" / "tokenizer"
    weights = checkpoint.load_frozen(folder)
    if weights is None:
        if not config.tokenizer.path:
            raise UserError(
                "config.tokenizer.path is empty: pre-training needs a tokenizer; train one with "
                "`python -m beit_jax.main --config=configs/dvae.py` and give its run folder, "
                "--config.tokenizer.path=runs/dvae."
            )
        weights = checkpoint.load_weights(config.tokenizer.path, "tokenizer.path")
        _check_tokenizer(config, weights)
        checkpoint.save_frozen(folder, weights)
    _check_tokenizer(config, weights)
    network = dvae.make_model(weights.config)
    down = 2 ** (network.groups - 1)
    return weights.params, network, (grid[0] * down, grid[1] * down)


def _check_tokenizer(config, weights: checkpoint.Weights) -> None:
    if weights.config["task"] != "dvae":
        raise UserError(
            f"config.tokenizer.path={config.tokenizer.path} is a run of task "
            f"{weights.config['task']!r}, not of a tokenizer (dvae)."
        )
    channels = weights.config["data"]["channels"]
    if channels != config.data.channels:
        raise UserError(
            f"The tokenizer at {weights.source} was trained on {channels} channels, but "
            f"config.data.channels={config.data.channels}; train a tokenizer for these channels."
        )


def _picture_evaluator(predict, config):
    """Rows: original, masked, decoded true tokens, decoded tokens with the predicted ones."""
    draw = jax.jit(
        lambda weights, batch: predict(
            weights.params, weights.frozen, batch, row_keys(config.seed, 0, batch["index"])
        )
    )

    def evaluator(weights, batches):
        batch = next(batches(config.data.eval_split))
        masked, true, predicted = draw(weights, batch)
        images = batch["image"] / 255.0
        if true.shape != images.shape:
            true, predicted = (
                jax.image.resize(x, images.shape, "linear") for x in (true, predicted)
            )
        return {}, {"reconstruction": picture_rows(images, masked, true, predicted)}

    return evaluator
