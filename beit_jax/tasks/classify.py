"""Supervised classification: fine-tuning a pre-trained encoder, or training from scratch."""

import contextlib
import csv
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import class_names, losses
from beit_jax.architecture import images_of, make_classifier
from beit_jax.augment import color_jitter, normalize, to_unit
from beit_jax.data.pipeline import View
from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.task import Answers, Purpose, Task, Weights, example_weights, keys_for, mean_of_sums

TOP = 5  # classes that count as found, and that an answer names


def build(config, source: Source, run: Path) -> Task:
    """Builds classification over the training data's classes."""
    names = source.class_names
    if not names:
        raise UserError(
            f"config.data.source={config.data.source} has no labels; classification needs them: "
            "sort the images into one sub-folder a class, or name a labelled TFDS dataset."
        )
    class_names.check(run, source)
    model = make_classifier(config, len(names))

    def init(key):
        return model.init(key, jnp.zeros(images_of(config).shape))["params"], {}

    def logits_of(params, images, drop_keys=None):
        images = normalize(images, config.model.mean, config.model.std)
        return model.apply({"params": params}, images, drop_keys)

    def sums(logits, batch, smoothing: float):
        labels = batch["label"]
        # Images without a label (-1), such as files beside the class folders, weigh nothing.
        weight = example_weights(batch) * (labels >= 0)
        loss = losses.cross_entropy(logits, labels, smoothing)
        hits = (logits.argmax(-1) == labels).astype(jnp.float32)
        return {
            "loss": ((loss * weight).sum(), weight.sum()),
            "accuracy": ((hits * weight).sum(), weight.sum()),
        }

    def loss_fn(params, model_state, frozen, batch, keys, step):
        images = batch["image"]
        if config.data.color_jitter:
            (images,) = color_jitter(
                keys_for(keys, Purpose.JITTER), (to_unit(images),), config.data.color_jitter
            )
        logits = logits_of(params, images, keys_for(keys, Purpose.DROP_PATH))
        values = sums(logits, batch, config.classify.label_smoothing)
        return values["loss"], ({}, values)

    def eval_fn(params, model_state, frozen, batch, keys):
        return sums(logits_of(params, batch["image"]), batch, 0.0)

    def predict(weights: Weights, batch):
        """Class probabilities float32 [B, C]."""
        return jax.nn.softmax(logits_of(weights.params, batch["image"]).astype(jnp.float32))

    return Task(
        views={"image": View(tuple(config.data.image_size), config.data.interpolation)},
        init=init,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        finalize=mean_of_sums,
        frozen={},
        predict=predict,
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
