"""What every source of images offers, whatever lies behind it."""

from typing import NamedTuple, Protocol

import numpy as np

from beit_jax.data.masks import LabelMap


class Record(NamedTuple):
    """One example before decoding."""

    image: bytes | np.ndarray  # an encoded file, or pixels uint8 or uint16 [H, W] or [H, W, ch]
    label: int  # index into the source's class names, -1 where there is none
    name: str  # what a person finds the image by


class Source(Protocol):
    """A split of a data set with random access, safe to read from several threads.

    `class_names` is empty where nothing is labelled, and the same for all splits of a data set.
    `mask_classes` is None where images have no label maps (such sources have no `mask` either);
    else what their pixels are told apart as, empty where nothing names it.
    `description` tells a person what was opened; `fingerprint` changes when the examples, their
    order or their labels do (pixels are not read for it).
    """

    class_names: tuple[str, ...]
    mask_classes: tuple[str, ...] | None
    description: str
    fingerprint: str

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Record:
        """Example `index`; raises OSError where it cannot be read."""

    def name(self, index: int) -> str:
        """What a person finds example `index` by, whether or not it can be read."""

    def labels(self) -> np.ndarray:
        """All labels, int32 [len], without decoding an image."""

    def mask(self, index: int) -> LabelMap:
        """The label map of example `index`; raises OSError where it cannot be read."""
