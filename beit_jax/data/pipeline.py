"""Batches of uint8 views, read ahead in threads.

Order and augmentation are pure functions of (seed, position), where position counts examples of
the run: global batch times batch size plus row. Nothing depends on which process or thread makes
an example, so worker and process counts change no batch, and a run's place in the data is one
number, the global batches consumed. Grain reads ahead and batches.
"""

import atexit
import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from beit_jax.data import rand_augment
from beit_jax.data.bad_files import BadFiles
from beit_jax.data.decode import BadImage, decode
from beit_jax.data.geometry import (
    DRAWS,
    Augmentation,
    View,
    center_box,
    check_views,
    random_crop,
    resize,
)
from beit_jax.data.record import Record, Source
from beit_jax.errors import UserError

__all__ = ["Augmentation", "View", "eval_batches", "train_batches"]

Batch = dict[str, np.ndarray]
_MAX_NEIGHBOURS = 100  # unreadable images in a row; then nearly all of them are


def train_batches(
    source: Source,
    views: dict[str, View],
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    channels: int = 3,
    max_value: int = 65535,
    workers: int = 16,
    max_bad_share: float = 0.01,
    bad_files: str | Path | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches: this process's rows of every global batch.

    Every epoch is a fresh permutation of the source; a batch may straddle two epochs. An image
    that cannot be read gives way to the next one in the epoch's order, label and all.

    Args:
        source: a split with random access.
        views: name -> view; all views of an example are resizes of one crop and flip.
        augmentation: of that crop and flip.
        batch_size: examples of a global batch, over all processes.
        seed: of order and augmentation.
        start: global batches already consumed; costs nothing.
        channels, max_value: of `decode.decode`.
        workers: threads; 0 reads in the caller's.
        max_bad_share: share of the source that may be unreadable.
        bad_files: a text file that lists unreadable images and why, or None.
        process_index, process_count: which contiguous rows of a batch are this process's.

    Returns:
        An iterator of {view name: uint8 [b, H, W, channels], "label": int32 [b]} with
        b = batch_size / process_count. Its `close()` stops the threads.

    Raises:
        UserError: here, for a batch that the processes cannot share or an interpolation that does
            not exist; from the iterator, when too many images are unreadable.
    """
    check_views(views)
    rows = _Rows(batch_size, process_index, process_count)
    bad = BadFiles(len(source), max_bad_share, bad_files)
    reader = _Reader(source, views, channels, max_value, bad)

    def example(index: int) -> Batch:
        return reader.train_example(rows.position(index, start), seed, augmentation)

    return _iterate(_Examples(example, sys.maxsize // 2), rows.local, workers)


def eval_batches(
    source: Source,
    views: dict[str, View],
    *,
    batch_size: int,
    eval_crop: float,
    channels: int = 3,
    max_value: int = 65535,
    workers: int = 16,
    max_bad_share: float = 0.01,
    bad_files: str | Path | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The whole split once, in its own order: this process's rows of every global batch.

    The views are resizes of one centre box, which the first view sets (`geometry.center_box` with
    `eval_crop`). The last batch is filled up, so that all have one shape. Filling rows, and rows
    whose image cannot be read, are black and not valid.

    Arguments, errors and the iterator's end are those of `train_batches`.

    Returns:
        An iterator of {view name: uint8 [b, H, W, channels], "label": int32 [b], "index": int32
        [b], "valid": bool [b]}; index is the example's place in the split, and goes on counting
        in filling rows, where label is -1.
    """
    check_views(views)
    rows = _Rows(batch_size, process_index, process_count)
    bad = BadFiles(len(source), max_bad_share, bad_files)
    reader = _Reader(source, views, channels, max_value, bad)

    def example(index: int) -> Batch:
        return reader.eval_example(rows.position(index, 0), eval_crop)

    batches = -(-len(source) // batch_size)
    return _iterate(_Examples(example, batches * rows.local), rows.local, workers)


def shuffled_index(position: int, seed: int, length: int) -> int:
    """The example of a source of `length` that is read at `position`; O(1) in time and space."""
    epoch, place = divmod(position, length)
    return grain.experimental.index_shuffle(
        place, max_index=length - 1, seed=_epoch_seed(seed, epoch), rounds=4
    )


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


class _Rows(NamedTuple):
    """The contiguous rows of every global batch that belong to one process."""

    batch_size: int
    process_index: int
    process_count: int

    @property
    def local(self) -> int:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"a batch of {self.batch_size} cannot be shared by {self.process_count} processes: "
                "make the batch size a multiple of their number."
            )
        return self.batch_size // self.process_count

    def position(self, index: int, start: int) -> int:
        """Global position of this process's example `index` after `start` batches."""
        batch, row = divmod(index, self.local)
        return (start + batch) * self.batch_size + self.process_index * self.local + row


class _Examples:
    """A random-access source for Grain over a pure function of the index."""

    def __init__(self, example, length: int):
        self._example, self._length = example, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._example(index)


def _iterate(examples: _Examples, batch_size: int, workers: int) -> Iterator[Batch]:
    ahead = max(batch_size, 4 * workers) if workers else 0
    dataset = (
        grain.MapDataset.source(examples)
        .to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead))
        .batch(batch_size)
    )
    if workers:  # stacks the next batch while the caller works on this one
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)
    iterator = _until_closed(dataset)
    _open_iterators.add(iterator)
    return iterator


def _until_closed(dataset: grain.IterDataset) -> Iterator[Batch]:
    batches = iter(dataset)
    try:
        yield from batches
    finally:
        batches.close()


_open_iterators: weakref.WeakSet = weakref.WeakSet()


@atexit.register  # or Grain would stop its threads when the modules that it needs are gone
def _close_iterators() -> None:
    for iterator in list(_open_iterators):
        with contextlib.suppress(ValueError):  # another thread is just inside of it
            iterator.close()


class _Reader(NamedTuple):
    """Makes one example."""

    source: Source
    views: dict[str, View]
    channels: int
    max_value: int
    bad: BadFiles

    def train_example(self, position: int, seed: int, augmentation: Augmentation) -> Batch:
        image, label = self._readable(position, seed)
        # A counter-based generator keyed by (seed, position): no state is carried along.
        key = np.array([seed, position], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        draws = generator.random(DRAWS + 1)
        scale, ratio = augmentation.crop_scale, augmentation.crop_ratio
        top, left, height, width = random_crop(*image.shape[:2], scale, ratio, draws[:DRAWS])
        # Cut first: the resampling kernel must not see beyond the crop, as in torchvision.
        crop = image[top : top + height, left : left + width]
        if draws[DRAWS] < augmentation.flip:
            crop = crop[:, ::-1]
        crop = np.ascontiguousarray(crop)
        example = {name: resize(crop, view) for name, view in self.views.items()}
        if augmentation.magnitude:
            plan, mean = rand_augment.draw(generator, augmentation.magnitude), augmentation.mean
            example = {n: rand_augment.apply(image, plan, mean) for n, image in example.items()}
        return {**example, "label": np.int32(label)}

    def eval_example(self, index: int, eval_crop: float) -> Batch:
        image, label = None, -1
        if index < len(self.source):
            image, label = self._read(index)
        if image is None:
            empty = np.zeros((1, 1, self.channels), np.uint8)
            example = {name: resize(empty, view) for name, view in self.views.items()}
        else:
            size = next(iter(self.views.values())).size
            box = center_box(*image.shape[:2], size, eval_crop)
            example = {name: resize(image, view, box) for name, view in self.views.items()}
        return {
            **example,
            "label": np.int32(label),
            "index": np.int32(index),
            "valid": np.bool_(image is not None),
        }

    def _readable(self, position: int, seed: int) -> tuple[np.ndarray, int]:
        """The image at a position, or the next readable one in the order of its epoch."""
        length = len(self.source)
        epoch, place = divmod(position, length)
        for step in range(min(length, _MAX_NEIGHBOURS)):
            neighbour = epoch * length + (place + step) % length
            image, label = self._read(shuffled_index(neighbour, seed, length))
            if image is not None:
                return image, label
        raise self.bad.error(f"{step + 1} images in a row")

    def _read(self, index: int) -> tuple[np.ndarray | None, int]:
        """Image and label; no image, and a note in the list, where it cannot be read."""
        record = Record(b"", -1, f"example {index}")
        try:
            record = self.source[index]
            image = decode(record.image, channels=self.channels, max_value=self.max_value)
        except (BadImage, OSError) as error:
            self.bad.add(index, record.name, str(error))
            return None, record.label
        return image, record.label
