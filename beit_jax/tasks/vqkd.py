"""BEiT v2's tokenizer: codes from which a teacher's features can be told (Peng et al. 2022, 2.2).

Loss, as in the official code: one minus the cosine between the decoder's features and the
teacher's, averaged over patches, plus the mean squared distance of the encoder's vectors from
their codes. The codebook gets no gradient; it is model state and follows its vectors' means.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import checkpoint, health, teacher
from beit_jax.architecture import images_of, make_vqkd, patch_grid
from beit_jax.augment import color_jitter, to_unit
from beit_jax.checkpoint import HISTORY
from beit_jax.data.pipeline import View
from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.frozen import frozen_network
from beit_jax.models import quantizer
from beit_jax.models.vqkd import VQKD, map_pixels
from beit_jax.task import Purpose, Task, Weights, example_weights, keys_for, mean_of_sums
from beit_jax.tasks import codebook
from beit_jax.teacher import Teacher


class Distillation(NamedTuple):
    """The tokenizer, its teacher, and the task's functions over them."""

    model: VQKD
    teacher: Teacher
    views: Mapping[str, View]  # "image", and "teacher_image" where the teacher's differs
    config: ConfigDict
    updates_per_epoch: float

    def init(self, key):
        variables = self.model.init(key, jnp.zeros(images_of(self.config).shape))
        age = jnp.zeros(self.model.codes, jnp.int32)  # updates since a code was last chosen
        return variables["params"], {"codebook": variables["codebook"], HISTORY: {"age": age}}

    def loss_fn(self, params, model_state, frozen, batch, keys, step):
        views = {name: to_unit(batch[name]) for name in self.views}
        if strength := self.config.data.color_jitter:
            jittered = color_jitter(keys_for(keys, Purpose.JITTER), [*views.values()], strength)
            views = dict(zip(views, jittered, strict=True))
        found = self.imitate(params, model_state, views)
        sums = self.sums(found, frozen, views, example_weights(batch))
        vqkd, (tokens, normalized, *_) = self.config.vqkd, found.quantized
        age = model_state[HISTORY]["age"]
        sums["recent_usage"] = ((age <= vqkd.dead_after).mean(), jnp.ones(()))
        sums["epoch_usage"] = ((age < self.updates_per_epoch).mean(), jnp.ones(()))
        statistics = {"codes": quantizer.statistics(normalized, tokens, vqkd.codes)}
        if vqkd.restart_dead:
            vectors = normalized.reshape(len(keys), -1, vqkd.code_width)
            statistics["candidates"] = quantizer.candidates(
                vectors, keys_for(keys, Purpose.RESTART), self.config.train.batch_size
            )
        return sums["loss"], (statistics, sums)

    def eval_fn(self, params, model_state, frozen, batch, keys):
        views = {name: to_unit(batch[name]) for name in self.views}
        found = self.imitate(params, model_state, views)
        return self.sums(found, frozen, views, example_weights(batch))

    def update_state(self, model_state, statistics):
        vqkd, codes = self.config.vqkd, statistics["codes"]
        book = quantizer.follow(model_state["codebook"], codes, vqkd.decay)
        age = jnp.where(codes.counts > 0, 0, model_state[HISTORY]["age"] + 1)
        if vqkd.restart_dead:
            dead = age > vqkd.dead_after
            vectors, moved = quantizer.restart(book["vectors"], dead, statistics["candidates"])
            book, age = book | {"vectors": vectors}, jnp.where(moved, 0, age)
        return {"codebook": book, HISTORY: {"age": age}}

    def predict(self, weights: Weights, batch):
        """Tokens int32 [B, h, w]."""
        variables = {"params": weights.params, "codebook": weights.model_state["codebook"]}
        return self.model.apply(variables, map_pixels(to_unit(batch["image"])), method="tokens")

    def imitate(self, params, model_state, views):
        """`models.vqkd.Imitation` of the views [B, H, W, ch] in [0, 1]."""
        variables = {"params": params, "codebook": model_state["codebook"]}
        return self.model.apply(variables, map_pixels(views["image"]))

    def sums(self, found, frozen, views, weight):
        """Sums over images of the loss and its parts, each the mean over an image's patches."""
        seen = views.get("teacher_image", views["image"])
        target = jax.lax.stop_gradient(self.teacher.features(frozen, seen))
        chex.assert_equal_shape((found.features, target))  # [B, N, T]
        cosine = (quantizer.normalize(found.features) * quantizer.normalize(target)).sum(-1)
        imitation = (1 - cosine).mean(1)
        commitment = found.quantized.commitment.mean((1, 2))
        tokens = found.quantized.tokens.reshape(len(weight), -1)
        counted = jnp.broadcast_to(weight[:, None], tokens.shape)
        counts = jnp.zeros(self.model.codes).at[tokens].add(counted)

        def total(x):
            return (x * weight).sum(), weight.sum()

        return {
            "loss": total(imitation + commitment),
            "imitation": total(imitation),
            "commitment": total(commitment),
            "codes": (counts, weight.sum()),
        }

    def warm_start(self, params, model_state, frozen, batches):
        """Places the codes by k-means of the encoder's vectors, over as many batches as it needs.

        The official code takes what one process has of one batch, on each process its own. Starts
        are drawn without replacement, from the seed.
        """
        vqkd, book = self.config.vqkd, model_state["codebook"]

        @jax.jit
        def encode(variables, images):
            z = self.model.apply(variables, map_pixels(to_unit(images)), method="encode")
            return z.reshape(-1, vqkd.code_width)

        @jax.jit
        def cluster(vectors):
            vectors = quantizer.normalize(jnp.concatenate(vectors))
            key = jax.random.fold_in(jax.random.key(self.config.seed), int(Purpose.KMEANS))
            starts = jax.random.choice(key, len(vectors), (vqkd.codes,), replace=False)
            return quantizer.kmeans(vectors, vectors[starts], vqkd.kmeans)

        variables, vectors = {"params": params, "codebook": book}, []
        while sum(map(len, vectors)) < vqkd.kmeans_vectors * vqkd.codes:
            vectors.append(encode(variables, next(batches)["image"]))
        means, counts = cluster(vectors)
        number, empty = sum(map(len, vectors)), int((counts == 0).sum())
        return model_state | {"codebook": book | {"vectors": means}}, (
            f"k-means placed the {vqkd.codes} codes: {vqkd.kmeans} iterations over {number} "
            f"vectors of {len(vectors)} batches of {self.config.train.batch_size} images, with "
            f"{empty} codes without a vector"
        )

    def alarms(self, values: Mapping[str, float]) -> dict[str, str]:
        """Says when too few codes are chosen, lately in training or by a whole evaluation."""
        vqkd = self.config.vqkd
        short = health.short_of_codes(values, vqkd.alarm_usage, vqkd.dead_after)
        if short is None:
            return {}
        usage, where = short
        again = "give this command again with --config.vqkd.restart_dead=True, or "
        first = "" if vqkd.restart_dead else again
        others = ["fewer config.vqkd.codes", "a lower config.optimizer.learning_rate"]
        others += ["a smaller config.vqkd.dead_after"] * vqkd.restart_dead
        others += ["--config.vqkd.kmeans=10"] * (not vqkd.kmeans)
        return {
            where: f"only {usage:.1%} of the {vqkd.codes} codes were chosen {where}, so the "
            f"codebook has collapsed; stop, and {first}start in a "
            f"new --workdir with {', '.join(others[:-1])} or {others[-1]}."
        }


def build(config, source: Source, run: Path) -> Task:
    """Builds the tokenizer's task on a frozen teacher; labels are not needed."""
    _check(config)
    found, copies = _teacher(config, run)
    views = {"image": View(tuple(config.data.image_size), config.data.interpolation)}
    if found.view != views["image"]:
        views["teacher_image"] = found.view
    updates_per_epoch = len(source) / config.train.batch_size
    parts = Distillation(make_vqkd(config), found, views, config, updates_per_epoch)
    return Task(
        views=views,
        init=parts.init,
        loss_fn=parts.loss_fn,
        eval_fn=parts.eval_fn,
        finalize=finalize,
        frozen=found.variables,
        copies=copies,
        predict=parts.predict,
        update_state=parts.update_state,
        warm_start=parts.warm_start if config.vqkd.kmeans else None,
        alarms=parts.alarms,
        evaluators={"codes": codebook.gallery_evaluator(parts.predict, config.data.eval_split)},
    )


def finalize(sums) -> dict[str, jax.Array]:
    """Means, and how the codes are used: by one batch in training, by the split in evaluation.

    `dead_codes` are those that no image of the split chose, in training those that no batch chose
    in the last `config.vqkd.dead_after` updates; `recent_usage` is the share of the others, and
    `epoch_usage` of those that a batch chose in as many updates as an epoch has.
    """
    sums = dict(sums)
    counts, _ = sums.pop("codes")
    values = mean_of_sums(sums) | codebook.health(counts)
    if "recent_usage" in values:
        return values | {"dead_codes": jnp.round((1 - values["recent_usage"]) * len(counts))}
    return values | {
        "dead_codes": (counts == 0).sum(),
        "vectors_per_code": counts.sum() / len(counts),
    }


def _teacher(config, run: Path):
    def make(weights: checkpoint.Weights, named: str) -> Teacher:
        found = teacher.from_weights(weights, named, config.model.dtype)
        _check_teacher(config, found, f"The teacher at {weights.source}")
        return found

    advice = (
        "the tokenizer needs a teacher; import one with `python -m beit_jax.convert import FILE "
        "runs/clip`, or train an encoder, and give its run folder, --config.teacher.path=runs/clip."
    )
    return frozen_network(run, "teacher", config.teacher.path, make, advice)


def _check_teacher(config, found: Teacher, which: str) -> None:
    """Refuses a teacher that sees other images or gives other features than the config says."""
    if found.channels != config.data.channels:
        raise UserError(
            f"{which} reads {found.channels} channels, but config.data.channels="
            f"{config.data.channels}; name a teacher for these channels."
        )
    if found.width != config.vqkd.teacher_width:
        raise UserError(
            f"{which} gives features of width {found.width}, but config.vqkd.teacher_width="
            f"{config.vqkd.teacher_width}; give --config.vqkd.teacher_width={found.width}."
        )
    grid = patch_grid(config)
    if found.grid != grid:
        theirs, ours = (f"{height}x{width}" for height, width in (found.grid, grid))
        raise UserError(
            f"{which} sees an image as {theirs} patches, the tokenizer as {ours}; change "
            "config.data.image_size or config.model.patch_size so that both have as many."
        )


def _check(config) -> None:
    if config.vqkd.codes < 2:
        raise UserError(f"config.vqkd.codes={config.vqkd.codes} must be at least 2.")
    if config.model.drop_path:
        raise UserError(
            f"config.model.drop_path={config.model.drop_path} has no place in the tokenizer's "
            "training; set it to 0."
        )
    if {*config.model.mean, *config.model.std} != {0.5}:
        raise UserError(
            "config.model.mean and config.model.std must be (0.5,) each: the tokenizer's pixels "
            "lie in [-1, 1]; set them so."
        )
