"""Supervised classification: fine-tuning a pre-trained encoder, or training from scratch."""

import contextlib
import csv
import errno
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import attention, class_names, losses
from beit_jax.architecture import images_of, make_classifier
from beit_jax.augment import color_jitter, erase, mix, normalize, to_unit
from beit_jax.data.pipeline import View
from beit_jax.data.record import Source
from beit_jax.models.beit import Classifier
from beit_jax.task import Answers, Purpose, Task, Weights, example_weights, keys_for, mean_of_sums

TOP = 5  # classes that count as found, and that an answer names


class Classification(NamedTuple):
    """The parts of classification, from which `build` takes its functions."""

    model: Classifier
    names: tuple[str, ...]  # of the classes
    config: ConfigDict

    def init(self, key):
        return self.model.init(key, jnp.zeros(images_of(self.config).shape))["params"], {}

    def logits(self, params, images, drop_keys=None):
        images = normalize(images, self.config.model.mean, self.config.model.std)
        return self.model.apply({"params": params}, images, drop_keys)

    def augment(self, batch, keys):
        """Jitters, erases and mixes, in the official order; a mixed image has two labels."""
        images, data, settings = batch["image"], self.config.data, self.config.classify
        if data.color_jitter:
            keys_jitter = keys_for(keys, Purpose.JITTER)
            (images,) = color_jitter(keys_jitter, (to_unit(images),), data.color_jitter)
        if settings.erase:
            keys_erase, model = keys_for(keys, Purpose.ERASE), self.config.model
            images = erase(keys_erase, images, settings.erase, model.mean, model.std)
        if not (settings.mixup or settings.cutmix):
            return {**batch, "image": images}
        images, own = mix(
            keys_for(keys, Purpose.MIX),
            images,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            switch=settings.mix_switch,
        )
        labels = jnp.stack([batch["label"], batch["label"][::-1]], axis=-1)
        return {
            **batch,
            "image": images,
            "label": labels,
            "share": jnp.stack([own, 1.0 - own], axis=-1),
        }

    def loss_fn(self, params, model_state, frozen, batch, keys, step):
        logits = self.logits(params, batch["image"], keys_for(keys, Purpose.DROP_PATH))
        values = self.sums(logits, batch, self.config.classify.label_smoothing)
        return values["loss"], ({}, values)

    def eval_fn(self, params, model_state, frozen, batch, keys):
        return self.sums(self.logits(params, batch["image"]), batch, 0.0)

    def sums(self, logits, batch, smoothing: float):
        """Loss, top-1 and top-5 accuracy against one label a row, or the two of a mixed image.

        Cross-entropy is linear in its target, so a mixed target, smoothed as timm does before it
        mixes, is the mixture of two losses. With five classes or fewer the top five are all, and
        `top5_accuracy` is left out.
        """
        labels = batch["label"].reshape(len(logits), -1)  # [B, 1 or 2]
        shares = batch["share"] if "share" in batch else jnp.ones(labels.shape)
        # Images without a label (-1), such as files beside the class folders, weigh nothing.
        weights = example_weights(batch)[:, None] * shares * (labels >= 0)
        loss = jax.vmap(losses.cross_entropy, (None, 1, None), 1)(logits, labels, smoothing)
        _, best = jax.lax.top_k(logits, min(TOP, len(self.names)))
        found = best[..., None] == labels[:, None]  # [B, TOP, 1 or 2]
        values = {"loss": loss, "accuracy": found[:, 0]}
        if len(self.names) > TOP:
            values["top5_accuracy"] = found.any(axis=1)
        total = weights.sum()
        return {name: ((value * weights).sum(), total) for name, value in values.items()}

    def predict(self, weights: Weights, batch):
        """Class probabilities float32 [B, C]."""
        logits = self.logits(weights.params, batch["image"])
        return jax.nn.softmax(logits.astype(jnp.float32))


def build(config, source: Source, run: Path) -> Task:
    """Builds classification over the training data's classes."""
    names = source.class_names
    class_names.refuse_fewer_than_two(config, names)
    class_names.check(run, source, names)
    parts = Classification(make_classifier(config, len(names)), names, config)
    return Task(
        views={"image": View(tuple(config.data.image_size), config.data.interpolation)},
        init=parts.init,
        augment=parts.augment,
        loss_fn=parts.loss_fn,
        eval_fn=parts.eval_fn,
        finalize=mean_of_sums,
        frozen={},
        predict=parts.predict,
        evaluators={"attention": attention.make_evaluator(config)} if config.eval.attention else {},
        class_names=names,
        answers=Answers(
            lambda probabilities: likeliest(probabilities, names),
            "predictions.csv",
            lambda path: write_csv(path, min(TOP, len(names))),
        ),
    )


def likeliest(probabilities: np.ndarray, names: tuple[str, ...]) -> list[tuple[str, float]]:
    """The (at most five) likeliest classes with their probabilities [C], falling."""
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    return [(names[i], float(probabilities[i])) for i in order]


@contextlib.contextmanager
def write_csv(path: Path, classes: int) -> Iterator[Callable]:
    """Writes a line an image: file, then class and probability of each of the likeliest."""
    part = path.with_name(f"{path.name}.part")
    if path.is_dir():  # which would be found out when all the work is done
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    # Backslashes stand for what is no UTF-8: file names may be any bytes.
    with open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        lines = csv.writer(file)
        header = itertools.product(range(1, classes + 1), ("class", "probability"))
        lines.writerow(["file", *(f"{what}_{rank}" for rank, what in header)])

        def write(name: str, answer: list[tuple[str, float]]) -> None:
            cells = ((which, f"{probability:.6f}") for which, probability in answer)
            lines.writerow([name, *itertools.chain.from_iterable(cells)])

        yield write
    part.replace(path)
