"""A TFDS data set in its usual TFRecord files, without TensorFlow.

A TFRecord file is a row of records: length (8 bytes, little-endian), checksum of the length (4),
data, checksum of the data (4). A record is a tf.train.Example, which is copied as it is.
"""

import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from beit_jax.data.archives.crc32c import masked_crc32c
from beit_jax.data.collection import Collection, Item, Part, Sample, file_stamp, limited
from beit_jax.data.decode import BadImage
from beit_jax.data.paths import local_path
from beit_jax.data.tfds_store import ImageFeatures
from beit_jax.errors import UserError

_HEAD = struct.Struct("<QI")
_FOOT = struct.Struct("<I")
_INFO = "dataset_info.json"


class _SameLayout(NamedTuple):
    """The features that the data set has already."""

    known: tfds.features.FeaturesDict

    def features(self, classes: int) -> tfds.features.FeaturesDict:
        return self.known


def open_tfrecord(path: str) -> Collection:
    """The data set in a folder, NAME/VERSION, that holds dataset_info.json.

    Raises:
        UserError: there is none, its files are missing, or it is stored otherwise.
    """
    root = local_path(path)
    if not (root / _INFO).is_file():
        below = sorted(str(found.parent) for found in root.glob(f"**/{_INFO}"))
        hint = f"below it lie {', '.join(below)}" if below else "it lies in NAME/VERSION"
        raise UserError(f"{root} holds no {_INFO} of a TFDS data set: {hint}.")
    info = tfds.builder_from_directory(str(root)).info
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise UserError(
            f"{root} is stored as {info.file_format.value} and not as tfrecord: read it as it is."
        )
    features = ImageFeatures.of(info.features, str(root))
    splits = {
        split.name: [
            _part(Path(file), length, features)
            for file, length in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
        for split in info.splits.values()
    }
    return Collection(splits, _SameLayout(info.features), info.description)


def _part(path: Path, length: int, features: ImageFeatures) -> Part:
    if not path.is_file():
        raise UserError(f"{path} is missing, which {path.parent / _INFO} lists: fetch it too.")

    def items() -> Iterator[Item]:
        for number, (offset, size) in enumerate(_records(path)):
            name = f"{path.name}, example {number}"
            yield Item(name, functools.partial(_read, path, offset, size, features, name))

    return Part(str(path), file_stamp(path), items, length)


def _records(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and size in bytes of each record's data."""
    with open(path, "rb") as file:
        end = os.path.getsize(path)
        place = 0
        while place < end:
            file.seek(place)
            head = file.read(_HEAD.size)
            size, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (end, 0)
            data = place + _HEAD.size
            place = data + size + _FOOT.size
            if place > end:
                raise _damaged(path, "is cut off", data)
            if masked_crc32c(head[:8]) != checksum:
                raise _damaged(path, "has a wrong checksum", data)
            yield data, size


def _read(path: Path, offset: int, size: int, features: ImageFeatures, name: str) -> Sample:
    size = limited(size)
    with open(path, "rb") as file:
        data = os.pread(file.fileno(), size + _FOOT.size, offset)
    if len(data) < size + _FOOT.size:
        raise _damaged(path, "is cut off", offset)
    example, foot = data[:size], data[size:]
    if masked_crc32c(example) != _FOOT.unpack(foot)[0]:
        raise _damaged(path, "has a wrong checksum", offset)
    try:
        record = features.record(example, name)
    except Exception as error:  # bytes that somebody wrote: the parser fails in many ways
        raise BadImage(f"it is no example of the features ({error})") from None
    return Sample(record.image, record.label, example)


def _damaged(path: Path, how: str, offset: int) -> UserError:
    return UserError(f"{path} {how} at byte {offset:,}: fetch it again.")
