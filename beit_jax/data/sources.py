"""`config.data.source` and a split to a `Source`."""

import functools

import numpy as np

from beit_jax.data.digits import NAME as DIGITS
from beit_jax.data.digits import Digits, ensure_digits
from beit_jax.data.folder import choose_split, folder_splits
from beit_jax.data.masks import LabelMap
from beit_jax.data.record import Record, Source
from beit_jax.data.scene_folder import is_scene_folder, scene_splits
from beit_jax.data.tfds_store import TfdsSource
from beit_jax.errors import UserError

__all__ = ["FewLabels", "Record", "Source", "open_source"]


def open_source(
    source: str,
    split: str,
    *,
    data_dir: str = "",
    holdout: float = 0.05,
    images_alone: bool = False,
) -> Source:
    """Opens a split of a data set.

    Args:
        source: `digits`, `folder:PATH` (with label maps where it holds images/ and annotations/)
            or `tfds:NAME[/CONFIG][:VERSION]`.
        split: train, validation, test or all; for TFDS a slice such as `train[99%:]` too.
        data_dir: where TFDS data sets lie; "" is TFDS's default.
        holdout: share of a folder without train/ and validation/ that is its validation split.
            Which images these are depends on their paths alone and on no seed, so that a
            tokenizer never trained on what a later stage holds out.
        images_alone: without label maps, which need not fit or be there at all.

    Raises:
        UserError: there is nothing to open; says what to do.
    """
    kind, _, rest = source.partition(":")
    if source == DIGITS:
        ensure_digits(data_dir)
        return TfdsSource(DIGITS, split, data_dir) if images_alone else Digits(split, data_dir)
    if kind == "folder" and rest:
        if is_scene_folder(rest):
            splits = scene_splits(rest, holdout, images_alone=images_alone)
        else:
            splits = folder_splits(rest, holdout)
        return choose_split(rest, split, splits)
    if kind == "tfds" and rest:
        return TfdsSource(rest, split, data_dir)
    raise UserError(
        f"config.data.source is {source!r}; it must be digits, folder:PATH or "
        "tfds:NAME[/CONFIG][:VERSION]."
    )


class FewLabels:
    """A balanced subset with `per_class` examples of every class, in the source's order.

    With the same seed, a smaller subset is part of a larger one. It is drawn when first read: what
    a network has learnt can be evaluated where a class has fewer.

    Raises:
      UserError: there are no labels; or, when it is drawn, a class has fewer examples.
    """

    def __init__(self, source: Source, per_class: int, seed: int):
        if not source.class_names:
            raise UserError(
                f"config.data.labels_per_class={per_class} needs labels, and {source.description} "
                "has none: sort the images into one sub-folder per class."
            )
        self._source, self._per_class, self._seed = source, per_class, seed
        self.class_names, self.mask_classes = source.class_names, source.mask_classes
        what = f"{per_class} labels a class of seed {seed}"
        self.description = f"{source.description}, {what}: {len(self):,} images"
        self.fingerprint = f"{source.fingerprint}:{what}"

    def __len__(self) -> int:
        return self._per_class * len(self.class_names)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._at(index)]

    def name(self, index: int) -> str:
        return self._source.name(self._at(index))

    def mask(self, index: int) -> LabelMap:
        return self._source.mask(self._at(index))

    def labels(self) -> np.ndarray:
        return self._source.labels()[self.indices]

    @functools.cached_property
    def indices(self) -> np.ndarray:
        """The chosen examples of the source, int [len], rising."""
        labels, chosen = self._source.labels(), []
        shuffled = np.random.default_rng(self._seed).permutation(len(labels))
        for label, name in enumerate(self.class_names):
            of_class = shuffled[labels[shuffled] == label]
            if len(of_class) < self._per_class:
                raise UserError(
                    f"config.data.labels_per_class is {self._per_class}, but class {name!r} has "
                    f"only {len(of_class)} images in {self._source.description}."
                )
            chosen.append(of_class[: self._per_class])
        return np.sort(np.concatenate(chosen))

    def _at(self, index: int) -> int:
        return int(self.indices[index])
