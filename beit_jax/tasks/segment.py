"""Semantic segmentation by UPerNet on a pre-trained encoder.

As the official ADE20K code (beit/semantic_segmentation, on mmsegmentation 0.11), but that the loss
is averaged over the labelled pixels, where mmsegmentation divides by all of them.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from beit_jax import class_names, losses, photometric, pictures, windows
from beit_jax.architecture import images_of, make_segmenter
from beit_jax.augment import color_jitter, normalize, to_unit
from beit_jax.data.masks import IGNORED, Labels
from beit_jax.data.pipeline import Scenes
from beit_jax.data.record import Source
from beit_jax.data.scenes import WHOLE
from beit_jax.errors import UserError
from beit_jax.models import upernet
from beit_jax.models.upernet import Segmenter
from beit_jax.task import Answers, Purpose, Task, Weights, keys_for, mean_of_sums
from beit_jax.windows import BAND, Windows


class Segmentation(NamedTuple):
    """The network and the task's functions over it."""

    model: Segmenter
    scenes: Scenes
    config: ConfigDict

    def init(self, key):
        variables = self.model.init(key, jnp.zeros(images_of(self.config).shape))
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    def augment(self, batch, keys):
        """Distorts colours; those around a smaller image are distorted with it."""
        images, strength = to_unit(batch["image"]), self.config.data.color_jitter
        if self.config.segment.photometric:
            images = photometric.distort(keys_for(keys, Purpose.PHOTOMETRIC), images)
        if strength:
            (images,) = color_jitter(keys_for(keys, Purpose.JITTER), (images,), strength)
        return {**batch, "image": images}

    def loss_fn(self, params, model_state, frozen, batch, keys, step):
        config, mask = self.config, batch["mask"]
        # With microbatches each is normalised by its own statistics; the running ones move once.
        found, updated = self.model.apply(
            {"params": params, **model_state},
            normalize(batch["image"], config.model.mean, config.model.std),
            keys_for(keys, Purpose.DROP_PATH),
            train=True,
            mutable=["moments"],
        )
        known = mask != IGNORED
        weight, labels = known.sum(dtype=jnp.float32), jnp.where(known, mask, 0).astype(jnp.int32)

        def total(logits):
            return (losses.cross_entropy(logits, labels) * known).sum()

        logits = upernet.resize(found.logits, mask.shape)
        hits = ((logits.argmax(-1) == labels) & known).sum(dtype=jnp.float32)
        decode_loss = loss = total(logits)
        sums = {"decode_loss": (decode_loss, weight), "aAcc": (hits, weight)}
        if found.auxiliary is not None:
            auxiliary = total(upernet.resize(found.auxiliary, mask.shape))
            loss = decode_loss + config.segment.auxiliary_weight * auxiliary
            sums["auxiliary_loss"] = (auxiliary, weight)
        return (loss, weight), (updated["moments"], {"loss": (loss, weight), **sums})

    def update_state(self, model_state, statistics):
        return {"batch_stats": upernet.follow(model_state["batch_stats"], statistics)}

    def eval_fn(self, params, model_state, frozen, batch, keys):
        """Pixels of the original label maps by class and prediction, and their loss."""
        classes, mask = self.model.classes, batch["mask"]
        if mask.size >= 2**31:
            raise UserError(
                f"config.eval.batch_size={len(mask)} label maps of {mask.shape[1]}x{mask.shape[2]} "
                "have more pixels than can be counted at once; set it lower."
            )
        mask = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % BAND), (0, 0)), constant_values=IGNORED)

        def add(sums, first, scores):
            pairs, loss = sums
            labels = jax.lax.dynamic_slice_in_dim(mask, first, BAND, axis=1).astype(jnp.int32)
            known = labels != IGNORED
            chosen = jnp.where(known, labels * classes + scores.argmax(-1), classes**2)
            count = jax.vmap(lambda pair: jnp.bincount(pair, length=classes**2 + 1))
            right = jnp.take_along_axis(scores, jnp.where(known, labels, 0)[..., None], axis=-1)
            loss -= (right[..., 0] * known).sum((1, 2))
            return pairs + count(chosen.reshape(len(mask), -1)), loss

        rows = len(mask)
        start = jnp.zeros((rows, classes**2 + 1), jnp.int32), jnp.zeros(rows)
        pairs, loss = self.fold(add, start, params, model_state, batch)
        confusion = pairs.sum(0)[:-1].reshape(classes, classes)  # by label, then by prediction
        labelled = confusion.sum()
        return {"confusion": (confusion, labelled), "loss": (loss.sum(), labelled)}

    def predict(self, weights: Weights, batch):
        """Classes uint8 [B, H, W] of the canvas, and int32 [B, 2] what of it is the image."""
        rows, height, width = batch["mask"].shape

        def put(canvas, first, scores):
            found = scores.argmax(-1).astype(jnp.uint8)
            return jax.lax.dynamic_update_slice_in_dim(canvas, found, first, axis=1)

        empty = jnp.zeros((rows, height + -height % BAND, width), jnp.uint8)
        found = self.fold(put, empty, weights.params, weights.model_state, batch)
        return {"classes": found[:, :height], "shape": batch["shape"]}

    def answer(self, row) -> Image.Image:
        """A label map as files number the classes, each in a colour of its own."""
        height, width = row["shape"]
        return pictures.coloured(self.scenes.labels.write(row["classes"][:height, :width]))

    def fold(self, fn, start, params, model_state, batch):
        """`windows.fold_bands` over all views of a batch."""
        config, segment = self.config, self.config.segment
        variables = {"params": params, "batch_stats": model_state["batch_stats"]}

        def network(images):
            images = normalize(images, config.model.mean, config.model.std)
            return self.model.apply(variables, images).logits

        def look(side: int, mirror: bool) -> Windows:
            return windows.look(
                network,
                batch[f"image_{side}"],
                batch[f"size_{side}"],
                batch["shape"],
                batch["mask"].shape[1:],
                window=self.scenes.size,
                stride=max(segment.stride, 1),
                mirror=mirror,
            )

        counts, mirrors = Counter(_sides(config)), (False, True) if segment.mirror else (False,)
        number = len(mirrors) * counts.total()
        views = [(n / number, look(side, m)) for side, n in counts.items() for m in mirrors]
        return windows.fold_bands(fn, start, views, batch["shape"][:, 0].max())


def build(config, source: Source, run: Path) -> Task:
    """Builds segmentation over the classes of the training data's label maps."""
    if source.mask_classes:
        class_names.check(run, source, source.mask_classes)
    classes = _number_of_classes(config, source)
    labels = Labels(classes, config.segment.reduce_zero_label)
    labels.check()
    _check(config)
    mean = config.model.mean * (config.data.channels if len(config.model.mean) == 1 else 1)
    scenes = Scenes(
        size=tuple(config.data.image_size),
        interpolation=config.data.interpolation,
        short_side=config.segment.short_side,
        resize=tuple(config.segment.resize),
        max_category=config.segment.max_category,
        fill=tuple(round(255 * value) for value in mean),  # nearly 0 when normalised
        labels=labels,
        sides=tuple(dict.fromkeys(_sides(config))),
    )
    parts = Segmentation(make_segmenter(config, classes), scenes, config)
    return Task(
        views=scenes,
        init=parts.init,
        augment=parts.augment,
        loss_fn=parts.loss_fn,
        eval_fn=parts.eval_fn,
        finalize=partial(finalize, names=source.mask_classes or tuple(map(str, range(classes)))),
        frozen={},
        predict=parts.predict,
        update_state=parts.update_state,
        class_names=source.mask_classes,
        answers=Answers(parts.answer, "predictions", pictures.write_folder),
    )


def finalize(sums, names: tuple[str, ...] = ()) -> dict[str, jax.Array]:
    """Means, and of an evaluation mIoU, mAcc and aAcc from its one confusion matrix.

    And IoU/<name> of each class that has one of `names`; NaN of a class that does not occur.

    As mmsegmentation: of a class the intersection over the union of label and prediction, and the
    share of its pixels that are found, each averaged over the classes that it is defined for; and
    the share of all labelled pixels that are right.
    """
    sums = dict(sums)
    if "confusion" not in sums:
        return mean_of_sums(sums)
    counts, labelled = sums.pop("confusion")
    # Operators alone: the evaluation counts in 64 bits, which jax.numpy would cut to 32.
    right, label, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = label + predicted - right
    ious = right / (union + (union == 0))
    with np.errstate(invalid="ignore"):  # a class that is nowhere has no score: not a number
        by_class = {f"IoU/{name}": ious[i] / (union[i] > 0) for i, name in enumerate(names)}
    return {
        **mean_of_sums(sums),
        **by_class,
        "mIoU": ious.sum() / (union > 0).sum(),
        "mAcc": (right / (label + (label == 0))).sum() / (label > 0).sum(),
        "aAcc": right.sum() / labelled,
    }


def _sides(config) -> list[int]:
    """The shorter side of each view in evaluation; below a window's it is the window's."""
    segment, window = config.segment, min(config.data.image_size)
    if not segment.stride:
        return [WHOLE]
    return [max(window, int(segment.short_side * scale)) for scale in segment.scales]


def _number_of_classes(config, source: Source) -> int:
    asked = config.segment.classes
    if source.mask_classes is None:
        raise UserError(
            f"config.data.source={config.data.source} has no label maps; segmentation needs them: "
            "give folder:PATH with images/ and annotations/ in it."
        )
    named = len(source.mask_classes)
    if not (asked or named):
        raise UserError(
            f"nothing says which classes the label maps of {source.description} tell apart; put "
            "classes.txt with a name a line beside images/, or set config.segment.classes."
        )
    if asked and named and asked != named:
        raise UserError(
            f"config.segment.classes={asked}, but {source.description}; set "
            f"--config.segment.classes={named}, or correct the list of names."
        )
    return asked or named


def _check(config) -> None:
    segment = config.segment
    if not segment.scales or min(segment.scales) <= 0:
        raise UserError(f"config.segment.scales={segment.scales} must be factors above 0.")
    if not segment.stride and tuple(segment.scales) != (1.0,):
        raise UserError(
            f"config.segment.scales={segment.scales} needs sliding windows: set "
            "config.segment.stride too."
        )
    if segment.stride > min(config.data.image_size):
        raise UserError(
            f"config.segment.stride={segment.stride} leaves gaps between windows of "
            f"config.data.image_size={config.data.image_size}; set it no larger than these."
        )
