"""What a trained network says of images: of arrays from Python, of a data source for `main`.

from beit_jax import predict
classifier = predict.load("runs/finetune_base")
classifier(images)  # uint8 [B, H, W, channels] -> for each image [(class, probability), ...]
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from beit_jax import checkpoint, class_names, limits, progress, reading, sharding, task, tasks
from beit_jax.data import pipeline
from beit_jax.data.record import Record
from beit_jax.errors import UserError
from beit_jax.interop.exporting import outputs_of


class Predictor:
    """A trained network as a function of NumPy images, with its own preprocessing."""

    def __init__(self, weights: checkpoint.Weights, config: ConfigDict, mesh):
        """Builds the task of `config`, which may read images otherwise, around a run's weights."""
        if config.task not in tasks.ANSWERING:
            raise UserError(
                f"{weights.source} is of task {config.task}, whose predictions are for no person "
                "to read; name a run that classifies or segments."
            )
        built = tasks.build(config, _Learnt(_names(weights)), weights.run)
        self.config, self.answers, self.views = config, built.answers, built.views
        found = task.Weights(weights.params, weights.model_state, built.frozen)
        self._weights = jax.device_put(found, sharding.state_sharding(found, mesh))
        self._predict = jax.jit(built.predict)

    def __call__(self, images: Sequence[np.ndarray]) -> list[Any]:
        """What the network says of each image.

        Args:
          images: uint8 [B, H, W, channels], or a sequence of [H, W, channels] of different sizes;
            resized and centre-cropped as in evaluation.

        Returns:
          an answer for each image; of a classifier the likeliest classes, at most five, as
          [(name, probability), ...]; of a segmentation a picture of the image's size with a
          palette, whose pixels (`np.asarray`) are the classes as label maps number them.
        """
        if not len(images):
            return []
        data = self.config.data
        (batch,) = pipeline.eval_batches(
            _Arrays([self._checked(np.asarray(image)) for image in images]),
            self.views,
            batch_size=len(images),
            eval_crop=data.eval_crop,
            channels=data.channels,
            workers=0,
        )
        rows = jax.device_get(self.predict(batch))
        return [self.answer(rows, i) for i in range(len(images))]

    def predict(self, batch: task.Batch) -> Any:
        """What the task predicts for a batch on the devices, a row an image."""
        return self._predict(self._weights, batch)

    def answer(self, rows: Any, row: int) -> Any:
        """The answer to one row of a prediction on the host."""
        return self.answers.of(jax.tree.map(lambda array: array[row], rows))

    def _checked(self, image: np.ndarray) -> np.ndarray:
        channels, shape = self.config.data.channels, image.shape
        fits = image.dtype == np.uint8 and len(shape) == 3 and shape[-1] == channels
        if not fits or not image.size:
            raise UserError(
                f"an image is {image.dtype} {shape}; the network reads uint8 [H, W, {channels}]."
            )
        return image


def load(path: str) -> Predictor:
    """Loads the network of a run's folder, or of one of its `checkpoints/<step>` folders."""
    weights = checkpoint.load_weights(str(path), "predict.load: path")
    mesh = sharding.make_mesh(1, jax.local_devices()[:1])
    return Predictor(weights, ConfigDict(weights.config), mesh)


def write(config: ConfigDict, folder: Path) -> None:
    """Writes what the newest checkpoint of a run says of every image of `config.data.source`.

    Every image that can be read is answered once, in the source's order, on any number of devices;
    the others are listed in the run's bad_files.txt.
    """
    config = config.copy_and_resolve_references()
    config.data.max_bad_share = 1.0  # a broken image has no answer, and takes none from the others
    limits.check(config)
    weights = checkpoint.load_weights(str(folder), "--workdir")
    mesh = sharding.make_mesh(config.mesh.fsdp)
    predictor = Predictor(weights, config, mesh)
    source = reading.open_split(config, config.data.predict_split, images_alone=True)
    screen = progress.Screen(config.eval.batch_size)
    screen.say(
        f"{config.task} by {weights.kind} of {weights.source} on {mesh.size} "
        f"{jax.default_backend()} devices\ndata: {source.description}"
    )
    path, answered = folder / predictor.answers.file, 0
    writer = predictor.answers.writer if jax.process_index() == 0 else _discard
    with _said(path), writer(path) as put:
        for batch in reading.eval_batches(source, predictor.views, config, folder, mesh):
            found = predictor.predict(batch), batch["index"], batch["valid"]
            rows, index, valid = multihost_utils.process_allgather(found, tiled=True)
            for row in np.flatnonzero(valid):
                put(source.name(int(index[row])), predictor.answer(rows, row))
            answered += int(valid.sum())
    screen.say(f"wrote {path}: {answered:,} of {len(source):,} images")
    if answered < len(source):
        screen.say(f"{len(source) - answered:,} cannot be read; see {folder / 'bad_files.txt'}")


@contextlib.contextmanager
def _said(path: Path):
    """Says in one sentence why answers cannot be written; images that cannot be read raise none."""
    try:
        yield
    except OSError as error:
        place, reason = error.filename or path, error.strerror or error
        raise UserError(
            f"{place} cannot be written ({reason}); make way and room for {path}."
        ) from error


def _discard(_: Path):
    """A writer for the processes that write nothing."""
    return contextlib.nullcontext(lambda name, answer: None)


class _Arrays:
    """Images in memory as a source."""

    mask_classes = None
    description = "the images given"

    def __init__(self, images: list[np.ndarray]):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], -1, f"image {index}")


class _Learnt:
    """Stands for the training data, of which prediction needs the class names alone."""

    description = "the run"

    def __init__(self, names: tuple[str, ...]):
        self.class_names = self.mask_classes = names

    def __len__(self) -> int:
        return 0


def _names(weights: checkpoint.Weights) -> tuple[str, ...]:
    """The run's class names; its classes' numbers where it has no names."""
    outputs, names = outputs_of(weights.params), class_names.read(weights.run)
    if names and len(names) != outputs:
        raise UserError(
            f"{weights.run / class_names.FILE} names {len(names):,} classes, but the network has "
            f"{outputs:,}; correct the file, or delete it to get their numbers."
        )
    return names or tuple(map(str, range(outputs)))
