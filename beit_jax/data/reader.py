"""One example: read, decoded and cut, as a pure function of (seed, position).

Epochs are permutations of the source. An image that cannot be read gives way to the next one in its
epoch's order, so that nothing shifts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import grain
import numpy as np
from numpy.random.bit_generator import ISeedSequence

from beit_jax.data import rand_augment
from beit_jax.data.bad_files import BadFiles
from beit_jax.data.decode import BadImage, BoxOf, decode
from beit_jax.data.geometry import (
    DRAWS,
    Augmentation,
    View,
    center_box,
    random_crop,
    resize,
    resize_quickly,
)
from beit_jax.data.record import Record, Source

Example = dict[str, np.ndarray]
_MAX_NEIGHBOURS = 100  # unreadable images in a row; then nearly all of them are
_SMALL = 1024  # examples; below it one epoch of Grain's shuffle takes as long as one of 30,000


def shuffled_index(position: int, seed: int, length: int) -> int:
    """The example of a source of `length` that is read at `position`; no large list is kept."""
    epoch, place = divmod(position, length)
    if length < _SMALL:
        return int(_permutation(_epoch_seed(seed, epoch), length)[place])
    return grain.experimental.index_shuffle(
        place, max_index=length - 1, seed=_epoch_seed(seed, epoch), rounds=4
    )


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, length: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).permutation(length)


class _Key(ISeedSequence):
    """Philox's key as it is; as its `key`, NumPy would first ask the system for entropy in vain."""

    def __init__(self, *words: int):
        self._words = np.array(words, np.uint64)

    def generate_state(self, n_words: int, dtype=np.uint64) -> np.ndarray:
        return self._words


def generator(position: int, seed: int) -> np.random.Generator:
    """What chance decides about the example at a position."""
    # Counter-based, keyed by (seed, position): no state is carried along.
    return np.random.Generator(np.random.Philox(_Key(seed, position)))


class Reader:
    """Images of a source, decoded, with what belongs to them: here their labels."""

    def __init__(self, source: Source, channels: int, max_value: int, bad: BadFiles):
        self.source, self.channels = source, channels
        self._max_value, self._bad = max_value, bad

    def belonging(self, index: int, record: Record, image: np.ndarray) -> Any:
        """What belongs to the image; raises BadImage or OSError where that cannot be read."""
        return record.label

    def read(self, index: int, box_of: BoxOf | None = None) -> tuple[np.ndarray, Any] | None:
        """An image uint8 [H, W, ch] and what belongs to it; None, and a note, if unreadable.

        With `box_of`, that of `decode`, what its box shows of the image.
        """
        try:
            record = self.source[index]
            image = decode(
                record.image, channels=self.channels, max_value=self._max_value, box_of=box_of
            )
            return image, self.belonging(index, record, image)
        except (BadImage, OSError) as error:
            self._bad.add(index, self.source.name(index), str(error))
            return None

    def readable(
        self, position: int, seed: int, box_of: BoxOf | None = None
    ) -> tuple[np.ndarray, Any]:
        """`read` at a position of training, or the next readable one in the order of its epoch."""
        length = len(self.source)
        epoch, place = divmod(position, length)
        for step in range(min(length, _MAX_NEIGHBOURS)):
            neighbour = epoch * length + (place + step) % length
            if found := self.read(shuffled_index(neighbour, seed, length), box_of):
                return found
        raise self._bad.error(f"{step + 1} images in a row")


class ViewReader(Reader):
    """Examples as views: all of an example are resizes of one crop and flip."""

    def __init__(self, source: Source, views: Mapping[str, View], *reading):
        super().__init__(source, *reading)
        self._views = views

    def training(self, seed: int, augmentation: Augmentation) -> Callable[[int], Example]:
        """The function from a position to its example."""
        return functools.partial(self._training_example, seed, augmentation)

    def evaluation(self, eval_crop: float) -> Callable[[int], Example]:
        """The function from an index to its example; beyond the source black and not valid."""
        return functools.partial(self._evaluation_example, eval_crop)

    def _training_example(self, seed: int, augmentation: Augmentation, position: int) -> Example:
        chance = generator(position, seed)
        draws = chance.random(DRAWS + 1)

        def box_of(height: int, width: int) -> tuple[int, int, int, int]:
            scale, ratio = augmentation.crop_scale, augmentation.crop_ratio
            return random_crop(height, width, scale, ratio, draws[:DRAWS])

        # Cut first: the resampling kernel must not see beyond the crop, as in torchvision.
        crop, label = self.readable(position, seed, box_of)
        flipped = draws[DRAWS] < augmentation.flip
        plan = None
        if augmentation.magnitude:
            plan = rand_augment.draw(chance, augmentation.magnitude)

        def finish(seen: np.ndarray) -> np.ndarray:
            if flipped:
                seen = cv2.flip(seen, 1).reshape(seen.shape)
            return seen if plan is None else rand_augment.apply(seen, plan, augmentation.mean)

        made = {view: finish(resize_quickly(crop, view)) for view in set(self._views.values())}
        return {**self._named(made), "label": np.int32(label)}

    def _named(self, made: dict[View, np.ndarray]) -> Example:
        return {name: made[view] for name, view in self._views.items()}

    def _evaluation_example(self, eval_crop: float, index: int) -> Example:
        found = self.read(index) if index < len(self.source) else None
        image, label = found or (np.zeros((1, 1, self.channels), np.uint8), -1)
        size = next(iter(self._views.values())).size
        box = center_box(*image.shape[:2], size, eval_crop)
        made = {view: resize(image, view, box) for view in set(self._views.values())}
        return {
            **self._named(made),
            "label": np.int32(label),
            "index": np.int32(index),
            "valid": np.bool_(found is not None),
        }
