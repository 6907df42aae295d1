"""A data set as a stream of parts, on its way into TFDS's format.

A split is a list of parts (a tar file, a table's rows, a folder), and a part a sequence of examples
that can be listed without reading their images. So a place in a split is two numbers, from which an
interrupted run goes on, and images are read by many threads at once.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from beit_jax.data.decode import BadImage
from beit_jax.data.folder import SPLIT_FOLDERS, check_share, hash_to_unit
from beit_jax.data.record import Record, Source
from beit_jax.errors import UserError

MAX_BYTES = 1 << 28  # of one image or example; what claims to be larger is not read
MAX_CLASSES = 1 << 20


class Sample(NamedTuple):
    """An example, read."""

    image: bytes | np.ndarray  # as in `Record`
    label: int  # -1 where there is none
    example: bytes  # a serialised tf.train.Example, which is what gets written


class Item(NamedTuple):
    """An example, listed."""

    name: str  # what a person finds it by
    read: Callable[[], Sample]  # thread-safe; raises BadImage, OSError, or UserError at its part


class Part(NamedTuple):
    """Some examples of a split, always in the same order."""

    name: str  # what a person finds it by
    stamp: str  # changes when the examples do
    items: Callable[[], Iterable[Item]]
    length: int | None = None  # examples, where that is known beforehand


class Layout(Protocol):
    """What is written of each example."""

    def features(self, classes: int) -> tfds.features.FeaturesDict:
        """For labels 0 to `classes` - 1, where their number was not known beforehand."""


class Collection(NamedTuple):
    """A data set to write."""

    splits: Mapping[str, Sequence[Part]]
    layout: Layout
    description: str = ""


class RecordLayout(NamedTuple):
    """`image` (encoded bytes as they are; arrays as PNG), `file_name`, and `label` if labelled."""

    labelled: bool
    class_names: tuple[str, ...] = ()  # empty: classes have numbers, as many as the labels need
    channels: int | None = 3
    encoding: str | None = None  # the images' format, where they all have the same

    def features(self, classes: int) -> tfds.features.FeaturesDict:
        features = {
            "image": tfds.features.Image(
                shape=(None, None, self.channels), encoding_format=self.encoding
            ),
            "file_name": tfds.features.Text(),
        }
        if self.class_names:
            features["label"] = tfds.features.ClassLabel(names=list(self.class_names))
        elif self.labelled:
            features["label"] = tfds.features.ClassLabel(num_classes=classes)
        return tfds.features.FeaturesDict(features)

    def item(self, name: str, read: Callable[[], Record]) -> Item:
        """An example whose record is yet to read."""
        return Item(name, functools.partial(self._sample, read))

    def _sample(self, read: Callable[[], Record]) -> Sample:
        record = read()
        self._check_label(record)
        image = _encoded(record.image)
        example = {"image": image, "file_name": record.name.encode(errors="surrogateescape")}
        if self.labelled:
            example["label"] = record.label
        return Sample(record.image, record.label, _serialize(self.labelled, example))

    def _check_label(self, record: Record) -> None:
        if not -1 <= record.label < MAX_CLASSES:
            raise BadImage(f"its label is {record.label}")
        if record.label >= 0 and not self.labelled:
            raise UserError(
                f"{record.name!r} has a label, and the first image none: label all or none."
            )
        if self.class_names and record.label >= len(self.class_names):
            raise UserError(
                f"{record.name!r} has label {record.label}, but there are "
                f"{len(self.class_names):,} class names, from 0 on: name all classes."
            )


def _serialize(labelled: bool, example: dict) -> bytes:
    """A tf.train.Example, the same bytes for the same example in every process."""
    features, serializer = _serializer(labelled)
    found = serializer.get_tf_example(features.encode_example(example))
    return found.SerializeToString(deterministic=True)


@functools.cache
def _serializer(labelled: bool) -> tuple[tfds.features.FeaturesDict, ExampleSerializer]:
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, None)),
            "file_name": tfds.features.Text(),
            **({"label": np.int64} if labelled else {}),  # a class label, whatever its classes
        }
    )
    return features, ExampleSerializer(features.get_serialized_info())


def _encoded(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return image
    colour = image.ndim == 3 and image.shape[2] == 3
    return cv2.imencode(".png", image[..., ::-1] if colour else image)[1].tobytes()


def check_class_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The names as a tuple; raises UserError where TFDS could not keep them, one a line."""
    names = tuple(names)
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else 0
    if twice:
        raise UserError(f"{where} names the class {min(twice)!r} twice: give each its own name.")
    for name in names:
        if not name.strip() or len(name.splitlines()) > 1:
            raise UserError(f"{where} has the class name {name!r}: it must be one line of text.")
    return names


def from_sources(splits: Mapping[str, Source]) -> Collection:
    """Sources, one part a split."""
    classes = next(iter(splits.values())).class_names
    layout = RecordLayout(bool(classes), classes)
    parts = {
        split: [
            Part(source.description, source.fingerprint, _items_of(source, layout), len(source))
        ]
        for split, source in splits.items()
    }
    return Collection(parts, layout)


def _items_of(source: Source, layout: RecordLayout) -> Callable[[], Iterator[Item]]:
    def items() -> Iterator[Item]:
        for index in range(len(source)):
            yield layout.item(source.name(index), functools.partial(source.__getitem__, index))

    return items


def records_part(name: str, records: Iterable[Record], layout: RecordLayout) -> Part:
    """Records that are in memory, or made one by one."""
    return Part(name, "", lambda: (layout.item(one.name, lambda one=one: one) for one in records))


def file_stamp(path: Path) -> str:
    """Changes when a file is replaced or written to."""
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"


_SPLIT_WORDS = {
    word: split
    for split, folders in SPLIT_FOLDERS.items()
    for word in (*folders, *{"train": ["training"], "validation": ["valid"]}.get(split, []))
}


def files_by_split(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that a folder of theirs or their own name names; "" where none does.

    Raises:
        UserError: some name one, and others do not.
    """
    found: dict[str, list[Path]] = {}
    for file in files:
        *folders, name = file.relative_to(root).parts
        words = [*folders[::-1], *re.split("[^a-z]+", name.lower())]
        split = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")
        found.setdefault(split, []).append(file)
    if len(found) > 1 and "" in found:
        raise UserError(
            f"{found[''][0]} names no split, and other files there do: put train, validation or "
            "test into its name, or move it away."
        )
    return found


def held_out(parts: Mapping[str, Sequence[Part]], share: float) -> dict[str, Sequence[Part]]:
    """Splits with a validation split: where there is none, a share of the training images.

    Which images these are depends on their names alone, as in `folder.hold_out`.
    """
    check_share(share)
    pool = "train" if "train" in parts else ""
    if "validation" in parts or pool not in parts or not share:
        splits = {split or "train": found for split, found in parts.items()}
    else:
        splits = {split: found for split, found in parts.items() if split != pool}
        splits["train"] = [_filtered(part, lambda place: place >= share) for part in parts[pool]]
        splits["validation"] = [
            _filtered(part, lambda place: place < share) for part in parts[pool]
        ]
    return {split: splits[split] for split in SPLIT_FOLDERS if split in splits}


def _filtered(part: Part, keep: Callable[[float], bool]) -> Part:
    def items() -> Iterator[Item]:
        return (item for item in part.items() if keep(hash_to_unit(item.name)))

    return Part(part.name, part.stamp, items)


def limited(size: int) -> int:
    """The size in bytes of what is about to be read; raises BadImage where it is no image's."""
    if not 0 <= size <= MAX_BYTES:
        raise BadImage(f"it has {size:,} bytes; up to {MAX_BYTES:,} are read")
    return size
