"""A folder of images with label maps: images/ and annotations/, as SceneParse150 has them.

Both hold the same splits, training/ (or train/), validation/ (or val/) and perhaps test/, or both
hold files directly, of which a share is held out as in any folder. A label map is found by its
image's path, whatever the two end in. objectInfo150.txt or classes.txt beside the two folders
names the classes.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from beit_jax.data.folder import ALL, hold_out, list_images
from beit_jax.data.masks import LabelMap
from beit_jax.data.paths import local_path
from beit_jax.data.record import Record
from beit_jax.errors import UserError

IMAGES, LABEL_MAPS = "images", "annotations"
SPLIT_FOLDERS = {
    "train": ("training", "train"),
    "validation": ("validation", "val"),
    "test": ("testing", "test"),
}


class SceneFolder:
    """One split of such a folder; a `Source` of images with label maps, or of the images alone."""

    class_names = ()

    def __init__(self, root: Path, pairs: list[tuple[str, str]], classes: tuple | None, split: str):
        self._root, self._pairs = str(root), pairs  # of an image and its label map, below the root
        self.mask_classes = classes
        self.description = f"folder:{root}, {split}: {len(pairs):,} images"
        if classes is not None:
            named = f"{len(classes)} named classes" if classes else "classes without names"
            self.description += f" with label maps of {named}"
        digest = hashlib.blake2b(digest_size=8)
        for name in (*(classes or ()), "", *(name for pair in pairs for name in pair)):
            digest.update(f"{name}\0".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Record:
        return Record(self._read(self._pairs[index][0]), -1, self._pairs[index][0])

    def name(self, index: int) -> str:
        return self._pairs[index][0]

    def mask(self, index: int) -> LabelMap:
        return LabelMap(self._read(self._pairs[index][1]), self._pairs[index][1])

    def labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int32)

    @classmethod
    def union(cls, splits: dict[str, "SceneFolder"]) -> "SceneFolder":
        """All examples of some splits of one folder, by path."""
        first = next(iter(splits.values()))
        pairs = sorted(pair for source in splits.values() for pair in source._pairs)
        return cls(Path(first._root), pairs, first.mask_classes, ALL)

    def _read(self, name: str) -> bytes:
        with open(os.path.join(self._root, name), "rb") as file:
            return file.read()


def is_scene_folder(path: str) -> bool:
    """Whether a folder is laid out so."""
    return all((local_path(path) / name).is_dir() for name in (IMAGES, LABEL_MAPS))


def scene_splits(
    path: str, holdout: float, *, images_alone: bool = False
) -> dict[str, SceneFolder]:
    """All splits of the folder; of `images_alone` whatever the label maps are.

    Raises:
        UserError: an image or a label map is alone, or there are none.
    """
    root = local_path(path)
    classes = None if images_alone else read_classes(root)
    kinds = (IMAGES,) if images_alone else (IMAGES, LABEL_MAPS)
    parts = {
        split: folders
        for split, names in SPLIT_FOLDERS.items()
        if (folders := _split_folders(root, kinds, names))
    }
    pairs = {
        split: pair_up(root, *folders) for split, folders in (parts or {"train": kinds}).items()
    }
    if "validation" not in pairs and "train" in pairs:
        of = dict(pairs["train"])
        pairs["train"], pairs["validation"] = (
            [(name, of[name]) for name in names] for names in hold_out(list(of), holdout)
        )
    return {n: SceneFolder(root, pairs[n], classes, n) for n in SPLIT_FOLDERS if pairs.get(n)}


def _split_folders(root: Path, kinds: tuple[str, ...], names: tuple[str, ...]) -> tuple | None:
    """A split's folder of images and its folder of label maps, which may be called otherwise."""
    found = [
        next((f"{kind}{os.sep}{name}" for name in names if (root / kind / name).is_dir()), None)
        for kind in kinds
    ]
    return None if None in found else tuple(found)


def pair_up(root: Path, images: str, label_maps: str = "") -> list[tuple[str, str]]:
    """Paths below the root of every image and its label map (or ""), by the image's path."""
    if not label_maps:
        return [(os.path.join(images, name), "") for name in _some_images(root / images)]
    found = {folder: _by_stem(root, folder) for folder in (images, label_maps)}
    for folder, other, missing in (
        (images, label_maps, "label map"),
        (label_maps, images, "image"),
    ):
        alone = sorted(found[folder].keys() - found[other].keys())
        if alone:
            raise UserError(
                f"{len(alone):,} files below {root / folder} have no {missing} of the same name "
                f"below {root / other}, the first is {found[folder][alone[0]]}: add what is "
                "missing, or move them away."
            )
    return sorted((name, found[label_maps][stem]) for stem, name in found[images].items())


def _by_stem(root: Path, folder: str) -> dict[str, str]:
    """Path below `folder` without its ending -> path below the root."""
    found: dict[str, str] = {}
    for name in _some_images(root / folder):
        stem, path = os.path.splitext(name)[0], os.path.join(folder, name)
        if stem in found:
            raise UserError(
                f"{root / path} and {root / found[stem]} differ in their ending alone, so that "
                "their pair cannot be told: keep one of them."
            )
        found[stem] = path
    return found


def _some_images(folder: Path) -> list[str]:
    if not (found := list_images(folder)):
        raise UserError(f"there is no image below {folder}: put images and label maps there.")
    return found


def read_classes(root: Path) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers; empty where no file names them."""
    info, plain = root / "objectInfo150.txt", root / "classes.txt"
    if info.is_file():  # a title, then columns: number from 1, shares and counts, name
        rows = [line.split("\t") for line in _lines(info)[1:]]
        if [row[0].strip() for row in rows] != [str(i + 1) for i in range(len(rows))]:
            raise UserError(
                f"{info} is not as SceneParse150 has it, a title and then a line for each of the "
                "classes 1, 2, ... with tabs: correct it, or put classes.txt in its place."
            )
        return tuple(row[-1].strip() for row in rows)
    return tuple(_lines(plain)) if plain.is_file() else ()


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}): save it as such.") from None
    return [line.strip() for line in lines if line.strip()]
