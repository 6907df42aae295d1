"""`config.data.source` and a split to a `Source`."""

import numpy as np

from beit_jax.data.digits import NAME as DIGITS
from beit_jax.data.digits import Digits, ensure_digits
from beit_jax.data.folder import choose_split, folder_splits
from beit_jax.data.masks import LabelMap
from beit_jax.data.record import Record, Source
from beit_jax.data.scene_folder import is_scene_folder, scene_splits
from beit_jax.data.tfds_store import TfdsSource
from beit_jax.errors import UserError

__all__ = ["Record", "Source", "few_labels", "open_source"]


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


class _Subset:
    """Some examples of a source; a `Source`."""

    def __init__(self, source: Source, indices: np.ndarray, what: str):
        self._source, self._indices = source, indices
        self.class_names, self.mask_classes = source.class_names, source.mask_classes
        self.description = f"{source.description}, {what}: {len(indices):,} images"
        self.fingerprint = f"{source.fingerprint}:{what}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def mask(self, index: int) -> LabelMap:
        return self._source.mask(int(self._indices[index]))

    def labels(self) -> np.ndarray:
        return self._source.labels()[self._indices]


def few_labels(source: Source, per_class: int, seed: int) -> Source:
    """A balanced subset with `per_class` examples of every class, in the source's order.

    With the same seed, a smaller subset is part of a larger one.

    Raises:
        UserError: there are no labels, or a class has fewer examples.
    """
    if not source.class_names:
        raise UserError(
            f"config.data.labels_per_class={per_class} needs labels, and {source.description} has "
            "none: sort the images into one sub-folder per class."
        )
    labels = source.labels()
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label, name in enumerate(source.class_names):
        of_class = shuffled[labels[shuffled] == label]
        if len(of_class) < per_class:
            raise UserError(
                f"config.data.labels_per_class is {per_class}, but class {name!r} has only "
                f"{len(of_class)} images in {source.description}."
            )
        chosen.append(of_class[:per_class])
    what = f"{per_class} labels a class of seed {seed}"
    return _Subset(source, np.sort(np.concatenate(chosen)), what)
