"""WebDataset: tar shards in which the files of one example lie side by side under one name.

A name ends at the first dot of its last part, and what follows tells what the file is: .jpg, .jpeg,
.png or .webp the image, .cls its label as a number, .json attributes, of which only `label` counts.
"""

import functools
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from beit_jax.data.archives import tar
from beit_jax.data.collection import (
    Collection,
    Item,
    Part,
    RecordLayout,
    check_class_names,
    file_stamp,
    files_by_split,
    held_out,
)
from beit_jax.data.decode import BadImage
from beit_jax.data.paths import local_path
from beit_jax.data.record import Record
from beit_jax.errors import UserError

CLASSES = "classes.txt"
_IMAGES = ("jpg", "jpeg", "png", "webp")
_MAX_LABEL = 1 << 20  # bytes of a .cls or .json file
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def open_webdataset(pattern: str, classes: str, holdout: float) -> Collection:
    """The shards of a folder, or those that a pattern names, such as `train-{000..146}.tar`.

    Args:
        pattern: a folder, below which all .tar files are shards; or a path with {from..to}, {a,b},
            * and ?.
        classes: a file with the name of one class a line; "" takes classes.txt beside the shards,
            where it is.
        holdout: share of the images that becomes validation where no shard is.

    Raises:
        UserError: there is no shard, or the first one or the class names cannot be read.
    """
    root, shards = _find(local_path(pattern))
    names = _class_names(root, classes)
    first = next((found for shard in shards for found in _examples(shard) if found.image), None)
    if first is None:
        raise UserError(f"no shard in {root} holds an image (.{', .'.join(_IMAGES)}).")
    labelled = _is_labelled(first)
    layout = RecordLayout(labelled, names if labelled else ())
    by_split = files_by_split(root, shards)
    parts = {split: [_part(file, layout) for file in files] for split, files in by_split.items()}
    return Collection(held_out(parts, holdout), layout)


class _Example(NamedTuple):
    """The files of one example."""

    name: str
    shard: Path
    files: dict[str, tar.Member]  # by what follows the first dot, in small letters

    @property
    def image(self) -> tar.Member | None:
        return next((self.files[kind] for kind in _IMAGES if kind in self.files), None)


def _find(root: Path) -> tuple[Path, list[Path]]:
    """The folder of all shards, and these."""
    if root.is_dir():
        found = sorted(root.glob("**/*.tar"))
    else:
        found = []
        for one in _without_braces(str(root)):
            matching = sorted(map(Path, glob.glob(one)))
            if not matching:
                raise UserError(f"there is no shard {one}: name the .tar files or their folder.")
            found += matching
        root = Path(os.path.commonpath([file.parent for file in found]))
    if not found:
        raise UserError(f"there is no .tar file below {root}: name the folder of the shards.")
    return root, found


def _without_braces(pattern: str) -> Iterator[str]:
    """All that a pattern with {000..146} and {a,b} stands for."""
    braces = _BRACES.search(pattern)
    if not braces:
        yield pattern
        return
    span = _RANGE.fullmatch(braces[1])
    choices = braces[1].split(",")
    if span:
        choices = [str(n).zfill(len(span[1])) for n in range(int(span[1]), int(span[2]) + 1)]
    for choice in choices:
        yield from _without_braces(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _class_names(root: Path, classes: str) -> tuple[str, ...]:
    path = Path(classes).expanduser() if classes else root / CLASSES
    if not classes and not path.exists():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the class names in {path} cannot be read: {error}.") from None
    return check_class_names((line.strip() for line in lines), str(path))


def _part(shard: Path, layout: RecordLayout) -> Part:
    def items() -> Iterator[Item]:
        for example in _examples(shard):
            yield layout.item(example.name, functools.partial(_record, example))

    return Part(str(shard), file_stamp(shard), items)


def _examples(shard: Path) -> Iterator[_Example]:
    def name(member: tar.Member) -> str:
        folder, file = os.path.split(member.name)
        return os.path.join(folder, file.split(".")[0])

    for key, group in itertools.groupby(tar.members(shard), name):
        yield _Example(key, shard, {_kind(member): member for member in group})


def _kind(member: tar.Member) -> str:
    return os.path.basename(member.name).partition(".")[2].lower()


def _record(example: _Example) -> Record:
    if example.image is None:
        raise BadImage(f"there is no image with it in {example.shard} (.{', .'.join(_IMAGES)})")
    label = _label(example)
    return Record(example.image.read(), -1 if label is None else label, example.image.name)


def _label(example: _Example) -> int | None:
    """The label of an example, where it has one."""
    for kind, parse in (("cls", int), ("json", _json_label)):
        if member := example.files.get(kind):
            if member.size > _MAX_LABEL:
                raise BadImage(f"its .{kind} file has {member.size:,} bytes")
            try:
                label = parse(member.read())
            except (ValueError, RecursionError):
                raise BadImage(f"its .{kind} file holds no label") from None
            if label is not None:
                return label
    return None


def _is_labelled(example: _Example) -> bool:
    try:
        return _label(example) is not None
    except BadImage:
        return True  # a label was meant


def _json_label(data: bytes) -> int | None:
    attributes = json.loads(data)
    label = attributes.get("label") if isinstance(attributes, dict) else None
    return label if isinstance(label, int) else None
