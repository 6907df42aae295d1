"""Scenes, which are images with label maps: how training and evaluation cut both alike.

Training resizes by chance and cuts one window out, as mmsegmentation 0.11 does for ADE20K (Resize,
RandomCrop, RandomFlip, Pad). Evaluation keeps an image whole and its label map as it is: every
image lies in the upper left corner of a canvas that has room for the largest of the split, so that
all have one shape, with its size beside it. Windows are cut from that on the device.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from beit_jax.data.decode import BadImage, read_size
from beit_jax.data.geometry import Augmentation, Box, View, resize
from beit_jax.data.masks import IGNORED, Labels
from beit_jax.data.reader import Example, Reader, generator
from beit_jax.data.record import Record, Source
from beit_jax.errors import UserError

CROP_TRIES = 11  # boxes drawn until no class fills one; the last is taken as it is
DRAWS = 2 + 2 * CROP_TRIES  # random numbers that one example consumes at most
MOST_OBLONG = 4  # longer side over shorter from which an image is made smaller, not longer
WHOLE = 0  # in the place of a shorter side: the image as a whole fits into the window


class Scenes(NamedTuple):
    """How images with label maps are cut, in the place of views."""

    size: tuple[int, int]  # pixels of a window, height and width
    interpolation: str  # of images; label maps take the nearest pixel
    short_side: int  # pixels of an image's shorter side in training, times
    resize: tuple[float, float]  # a factor from here to there, by chance
    max_category: float  # share of a training window that one class may fill, if it can be helped
    fill: tuple[int, ...]  # the colour beyond an image's border, one value a channel
    labels: Labels
    sides: tuple[int, ...]  # pixels of the shorter side in evaluation, one view each; or (WHOLE,)


def resized(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes `short`, rounded as in mmcv."""
    grow = min(short / min(size), MOST_OBLONG * short / max(size))
    return _scaled(size, grow)


def fitted(size: tuple[int, int], scenes: Scenes, side: int) -> tuple[int, int]:
    """Height and width of an image in the view `side` of evaluation."""
    if side != WHOLE:
        return resized(size, side)
    return _scaled(size, min(most / now for most, now in zip(scenes.size, size, strict=True)))


def _scaled(size: tuple[int, int], grow: float) -> tuple[int, int]:
    height, width = (max(1, int(side * grow + 0.5)) for side in size)
    return height, width


def random_window(
    image: np.ndarray, mask: np.ndarray, scenes: Scenes, flip: float, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A window of a resized and perhaps mirrored image, and of its label map.

    Args:
        image, mask: uint8 [H, W, ch] and [H, W].
        scenes: see there; where the resized image is smaller, fill and IGNORED lie around it.
        flip: probability of mirroring.
        draws: uniform numbers in [0, 1), [DRAWS].

    Returns:
        uint8 [*size, ch] and [*size].
    """
    low, high = scenes.resize
    whole = resized(mask.shape, int(scenes.short_side * (low + draws[0] * (high - low))))
    size = tuple(map(min, scenes.size, whole))
    for places in draws[2:].reshape(CROP_TRIES, 2):
        top, left = (
            int(at * (all_ - part + 1)) for at, all_, part in zip(places, whole, size, strict=True)
        )
        box = _box_of(mask.shape, whole, top, left, size)
        labels = resize(mask[..., None], View(size, "nearest"), box)[..., 0]
        if is_varied(labels, scenes.max_category):
            break
    picture = resize(image, View(size, scenes.interpolation), box)
    if draws[1] < flip:
        picture, labels = picture[:, ::-1], labels[:, ::-1]
    return laid_on(scenes.size, picture, scenes.fill), laid_on(scenes.size, labels, IGNORED)


def _box_of(original, whole, top: int, left: int, size) -> Box:
    """Where a box of the resized image lies in the original."""
    down, across = (now / then for now, then in zip(original, whole, strict=True))
    bottom, right = min((top + size[0]) * down, original[0]), (left + size[1]) * across
    return Box(left * across, top * down, min(right, original[1]), bottom)


def is_varied(labels: np.ndarray, most: float) -> bool:
    """Whether there are two classes, and none has more than the share `most` of what is labelled.

    mmsegmentation's rule (`cat_max_ratio`).
    """
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return (counts > 0).sum() > 1 and counts.max() < most * counts.sum()


def laid_on(canvas: tuple[int, int], image: np.ndarray, fill) -> np.ndarray:
    """An image in the upper left corner of a canvas of height and width, `fill` around it."""
    found = np.empty((*canvas, *image.shape[2:]), image.dtype)
    found[:] = fill
    found[: image.shape[0], : image.shape[1]] = image
    return found


class Extent(NamedTuple):
    """The canvases of a split, each large enough for all of its images: heights and widths."""

    original: tuple[int, int]
    views: Mapping[int, tuple[int, int]]  # by the side of the view; at least a window large

    @classmethod
    def of(cls, sizes: list[tuple[int, int]], scenes: Scenes) -> "Extent":
        views = {
            side: _largest([scenes.size, *(fitted(size, scenes, side) for size in sizes)])
            for side in scenes.sides
        }
        return cls(_largest(sizes), views)


def _largest(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    return max(height for height, _ in sizes), max(width for _, width in sizes)


class SceneReader(Reader):
    """Examples as scenes, with label maps where the source has them."""

    def __init__(self, source: Source, scenes: Scenes, *reading):
        super().__init__(source, *reading)
        self._scenes = scenes

    def belonging(self, index: int, record: Record, image: np.ndarray) -> np.ndarray | None:
        """The label map uint8 [H, W] of an image, where there are any."""
        if self.source.mask_classes is None:
            return None
        return self._scenes.labels.read(self.source.mask(index), image.shape[:2])

    def training(self, seed: int, augmentation: Augmentation) -> Callable[[int], Example]:
        """The function from a position to its example."""
        return functools.partial(self._training_example, seed, augmentation.flip)

    def evaluation(self, eval_crop: float) -> Callable[[int], Example]:
        """The function from an index to its example; beyond the source empty and not valid."""
        del eval_crop  # every pixel is evaluated
        return functools.partial(self._evaluation_example, Extent.of(self._sizes(), self._scenes))

    def _sizes(self) -> list[tuple[int, int]]:
        """Height and width of every image that can be read, from the heads of their files."""
        found = [(1, 1)]
        for index in range(len(self.source)):
            try:
                found.append(read_size(self.source[index].image))
            except (BadImage, OSError):
                continue  # `read` will say so
        return found

    def _training_example(self, seed: int, flip: float, position: int) -> Example:
        image, mask = self.readable(position, seed)
        draws = generator(position, seed).random(DRAWS)
        picture, labels = random_window(image, mask, self._scenes, flip, draws)
        return {"image": picture, "mask": labels}

    def _evaluation_example(self, extent: Extent, index: int) -> Example:
        found = self.read(index) if index < len(self.source) else None
        unlabelled = np.full((1, 1), IGNORED, np.uint8)
        image, mask = found or (np.zeros((1, 1, self.channels), np.uint8), unlabelled)
        if any(now > most for now, most in zip(image.shape, extent.original, strict=False)):
            raise UserError(
                f"image {index} of {self.source.description} is larger than the head of its file "
                "says, which may turn it otherwise than its metadata do: save it anew."
            )
        example = {
            "shape": np.array(image.shape[:2], np.int32),
            "mask": laid_on(extent.original, unlabelled if mask is None else mask, IGNORED),
            "index": np.int32(index),
            "valid": np.bool_(found is not None),
        }
        for side, canvas in extent.views.items():
            size = fitted(image.shape[:2], self._scenes, side)
            view = resize(image, View(size, self._scenes.interpolation))
            example[f"image_{side}"] = laid_on(canvas, view, self._scenes.fill)
            example[f"size_{side}"] = np.array(size, np.int32)
        return example
