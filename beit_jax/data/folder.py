"""A folder of images, read where it lies.

With train/ and validation/ (or val/, and perhaps test/) below it, these are the splits. Otherwise
each image goes to train or validation by a hash of its path below the folder, so that an image
keeps its split when others come or go. "all" is the splits together, by path; TFDS calls it so too.
The first folder below the split's own names the label.
"""

import collections
import hashlib
import os
from pathlib import Path

import numpy as np

from beit_jax.data.decode import SUFFIXES
from beit_jax.data.paths import local_path
from beit_jax.data.record import Record, Source
from beit_jax.errors import UserError

ALL = "all"  # the split that is all splits
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class FolderSource:
    """One split of a folder; a `Source`."""

    mask_classes = None

    def __init__(
        self, root: Path, names: list[str], labels: np.ndarray, classes: tuple[str, ...], split: str
    ):
        self._root, self._names, self._labels = str(root), names, labels
        self.class_names = classes
        self.description = f"folder:{root}, {split}: {len(names):,} images, {len(classes)} classes"
        digest = hashlib.blake2b(digest_size=8)
        for name, label in zip(names, labels, strict=True):
            digest.update(f"{name}\0{label}\0".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        with open(os.path.join(self._root, name), "rb") as file:
            return Record(file.read(), int(self._labels[index]), name)

    def name(self, index: int) -> str:
        return self._names[index]

    def labels(self) -> np.ndarray:
        return self._labels

    @classmethod
    def union(cls, splits: dict[str, "FolderSource"]) -> "FolderSource":
        """All examples of some splits of one folder, by path."""
        names = [name for source in splits.values() for name in source._names]
        labels = np.concatenate([source._labels for source in splits.values()])
        order = sorted(range(len(names)), key=names.__getitem__)
        first = next(iter(splits.values()))
        root, names = Path(first._root), [names[i] for i in order]
        return cls(root, names, labels[order], first.class_names, ALL)


def choose_split(path: str, split: str, splits: dict[str, Source]) -> Source:
    """The split of a folder's `splits`; raises UserError where there is none of that name."""
    if "[" in split or "%" in split:
        raise UserError(
            f"the split {split!r} is a slice, which a folder does not have: use train, validation, "
            "test or all, and set config.data.holdout for the share that is held out."
        )
    if split == ALL:
        return type(next(iter(splits.values()))).union(splits)
    if split == "validation" and split not in splits and len(splits.get("train", ())) == 1:
        raise UserError(
            f"folder:{path} has one image, which leaves none to hold out as validation: add "
            "images, or set config.data.eval_split=train to evaluate on it too."
        )
    if split not in splits:
        raise UserError(
            f"folder:{path} has no split {split!r}: it has {', '.join(splits)} (from its folders "
            "train/, validation/ or val/, and test/, or held out by config.data.holdout), and all."
        )
    return splits[split]


def folder_splits(path: str, holdout: float) -> dict[str, FolderSource]:
    """All splits of a folder that hold an image, with one set of class names."""
    root = local_path(path)
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; config.data.source=folder:PATH needs the folder that "
            "holds the images."
        )
    parts = {name: root / folder for name, folder in _split_folders(root).items()}
    found = {name: list_images(part) for name, part in (parts or {"": root}).items()}
    if not any(found.values()):
        raise UserError(_nothing_found(root))
    # One numbering for all splits: a class that validation lacks must not shift the others.
    classes = tuple(sorted({c for names in found.values() for c in map(_class_of, names) if c}))
    if "validation" not in parts:
        pool = "train" if parts else ""
        found["train"], found["validation"] = hold_out(found.pop(pool), holdout)
        parts["validation"] = parts.setdefault("train", root)
    order = [name for name in SPLIT_FOLDERS if found.get(name)]
    return {n: _make_source(root, parts[n], found[n], classes, n) for n in order}


def _make_source(root: Path, part: Path, names: list[str], classes: tuple, split: str):
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(_class_of(name), -1) for name in names], np.int32)
    prefix = "" if part == root else f"{part.relative_to(root)}{os.sep}"
    return FolderSource(root, [prefix + name for name in names], labels, classes, split)


def _split_folders(root: Path) -> dict[str, str]:
    """Split name -> folder name; empty where the sub-folders are no splits."""
    present = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    found = {
        split: next(name for name in names if name in present)
        for split, names in SPLIT_FOLDERS.items()
        if present.intersection(names)
    }
    # "train" alone may be a class, beside planes and cars; beside val or test it is a split.
    return found if "train" in found and (len(found) > 1 or len(present) == 1) else {}


def list_images(root: Path) -> list[str]:
    """Paths of all images below `root`, relative to it, sorted; links are followed, once.

    Hidden files and folders (a leading dot, which covers macOS's `._x.jpg`) are left out.
    """
    names, visited = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        identity = os.path.realpath(folder)
        if identity in visited:  # a link back up would never end
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        inner = os.path.relpath(folder, root)
        for file in files:
            if not file.startswith(".") and file.lower().endswith(_ENDINGS):
                names.append(file if inner == "." else os.path.join(inner, file))
    return sorted(names)


_ENDINGS = tuple(SUFFIXES)


def hold_out(names: list[str], share: float) -> tuple[list[str], list[str]]:
    """Splits names into (kept, held out) by a hash of each name alone.

    At least one name is held out where `share` is above 0 and two or more are there, and at least
    one is kept.
    """
    check_share(share)
    places = {name: hash_to_unit(name) for name in names}
    held = {name for name, place in places.items() if place < share}
    if share and len(names) > 1:
        by_place = sorted(names, key=places.get)
        held = held or {by_place[0]}
        held = held if len(held) < len(names) else set(by_place[:-1])
    return [n for n in names if n not in held], [n for n in names if n in held]


def check_share(share: float) -> None:
    """Raises UserError where a share to hold out is none."""
    if not 0 <= share < 1:
        raise UserError(f"config.data.holdout is {share}; it must be at least 0 and below 1.")


def hash_to_unit(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    text = name.replace(os.sep, "/").encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) / 2**64


def _class_of(name: str) -> str:
    first, _, rest = name.partition(os.sep)
    return first if rest else ""


def _nothing_found(root: Path) -> str:
    """Says what lies in the folder instead of images."""
    counts = collections.Counter(
        os.path.splitext(file)[1].lower() or "(none)"
        for _, _, files in os.walk(root)
        for file in files
    )
    seen = ", ".join(f"{suffix} ({n:,})" for suffix, n in counts.most_common(8)) or "no file at all"
    return f"no image below {root}: images end in {' '.join(SUFFIXES)}, found was {seen}."
