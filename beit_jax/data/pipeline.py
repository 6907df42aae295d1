"""Batches of uint8 views, read ahead in threads.

Order and augmentation are pure functions of (seed, position), where position counts examples of
the run: global batch times batch size plus row. Nothing depends on which process or thread makes
an example, so worker and process counts change no batch, and a run's place in the data is one
number, the global batches consumed. Grain reads ahead, in threads that write each example into its
batch's row.
"""

import atexit
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np

from beit_jax.data.bad_files import BadFiles
from beit_jax.data.geometry import Augmentation, View, check_views
from beit_jax.data.reader import ViewReader
from beit_jax.data.record import Source
from beit_jax.data.scenes import SceneReader, Scenes
from beit_jax.errors import UserError

__all__ = ["Augmentation", "Scenes", "View", "Views", "eval_batches", "train_batches"]

Batch = dict[str, np.ndarray]
Views = Mapping[str, View] | Scenes  # what is seen of an example


def train_batches(
    source: Source,
    views: Views,
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
        views: name -> view; all views of an example are resizes of one crop and flip. Or scenes:
            images with label maps, see `scenes`.
        augmentation: of that crop and flip; of scenes the flip alone.
        batch_size: examples of a global batch, over all processes.
        seed: of order and augmentation.
        start: global batches already consumed; costs nothing.
        channels, max_value: of `decode.decode`.
        workers: threads; 0 reads in the caller's.
        max_bad_share: share of the source that may be unreadable.
        bad_files: a text file that lists unreadable images and why, or None.
        process_index, process_count: which contiguous rows of a batch are this process's.

    Returns:
        An iterator of {view name: uint8 [b, H, W, channels], "label": int32 [b]}, or of scenes
        {"image": uint8 [b, H, W, channels], "mask": uint8 [b, H, W]}, with b = batch_size /
        process_count. Its `close()` stops the threads.

    Raises:
        UserError: here, for a batch that the processes cannot share or an interpolation that does
            not exist; from the iterator, when too many images are unreadable.
    """
    rows = _Rows(batch_size, process_index, process_count)
    bad = BadFiles(len(source), max_bad_share, bad_files)
    make = _make_reader(source, views, channels, max_value, bad).training(seed, augmentation)

    def example(index: int) -> Batch:
        return make(rows.position(index, start))

    return _iterate(example, _ENDLESS, rows.local, workers)


def eval_batches(
    source: Source,
    views: Views,
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
        in filling rows, where label is -1. Of scenes {"image_<side>": uint8 [b, *, *, channels]
        and "size_<side>": int32 [b, 2] (height and width of what of it is the image) for every
        view, "mask": uint8 [b, *, *] and "shape": int32 [b, 2] likewise of the label map, "index",
        "valid"}, with all of an image in view; nothing is labelled where the source has no masks.
    """
    rows = _Rows(batch_size, process_index, process_count)
    bad = BadFiles(len(source), max_bad_share, bad_files)
    make = _make_reader(source, views, channels, max_value, bad).evaluation(eval_crop)

    def example(index: int) -> Batch:
        return make(rows.position(index, 0))

    return _iterate(example, -(-len(source) // batch_size), rows.local, workers)


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


_ENDLESS = 2**40  # batches
_MAX_STRIP = 8  # rows; more would make the first batch wait for few threads


class _Strips:
    """A random-access source for Grain: reading a strip fills some consecutive rows of a batch.

    Examples are copied into their batch as they are made, while the processor's cache holds them,
    and Grain's own work is done once a strip instead of once an example.
    """

    def __init__(self, example: Callable[[int], Batch], batches: int, batch_size: int):
        self._example, self._batches, self._batch_size = example, batches, batch_size
        self._rows = max(n for n in range(1, _MAX_STRIP + 1) if batch_size % n == 0)
        self._begun: dict[int, Batch] = {}
        self._lock = threading.Lock()

    @property
    def of_a_batch(self) -> int:
        """Strips that make up a batch."""
        return self._batch_size // self._rows

    def __len__(self) -> int:
        return self._batches * self.of_a_batch

    def __getitem__(self, index: int) -> int:
        """Fills strip `index`; returns its batch's number, of which `take` gives the arrays."""
        number = index // self.of_a_batch
        for place in range(index * self._rows, (index + 1) * self._rows):
            example = self._example(place)
            batch = self._room(number, example)
            for name, value in example.items():
                batch[name][place % self._batch_size] = value
        return number

    def _room(self, number: int, example: Batch) -> Batch:
        with self._lock:
            if number not in self._begun:
                self._begun[number] = {
                    name: np.empty((self._batch_size, *value.shape), value.dtype)
                    for name, value in example.items()
                }
            return self._begun[number]

    def take(self, numbers: Sequence[int]) -> Batch:
        """The batch whose strips have all been read."""
        return self._begun.pop(numbers[0])


def _iterate(
    example: Callable[[int], Batch], batches: int, batch_size: int, workers: int
) -> Iterator[Batch]:
    strips = _Strips(example, batches, batch_size)
    ahead = max(strips.of_a_batch, 2 * workers) if workers else 0
    dataset = (
        grain.MapDataset.source(strips)
        .to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead))
        .batch(strips.of_a_batch, batch_fn=strips.take)
    )
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


def eval_shapes(views: Views, rows: int, channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of `eval_batches`; scenes' depend on the split, here on none."""
    reader = _make_reader((), views, channels, 255, BadFiles(0, 0, None))
    beyond = reader.evaluation(1.0)(0)
    return {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for name, x in beyond.items()}


def _make_reader(source, views, channels, max_value, bad) -> ViewReader | SceneReader:
    if isinstance(views, Scenes):
        check_views({"image": View(views.size, views.interpolation)})
        return SceneReader(source, views, channels, max_value, bad)
    check_views(views)
    return ViewReader(source, views, channels, max_value, bad)
