"""The ArrayRecord shards of a data set that is being written, and the record of those finished.

A shard gets its name when it is complete, and then its line in progress.json, which says where its
split goes on.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from beit_jax.data.checked import START, Checked, Place
from beit_jax.data.collection import Collection
from beit_jax.errors import UserError

SHARD_EXAMPLES = 10_000
SHARD_BYTES = 1 << 30  # a shard ends with whichever is reached first
PROGRESS = "progress.json"
LOCK = ".lock"  # held by the process that writes in the folder
FORMAT = tfds.core.FileFormat.ARRAY_RECORD
_OPTIONS = "group_size:1"  # as in TFDS: every example can be read by itself
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


class Shard(NamedTuple):
    """A finished shard; without a file where a split's last examples are all bad."""

    split: str
    examples: int
    bytes: int
    classes: int  # that its labels need
    place: Place  # of the split, behind it
    history: str  # hash of the parts of the split up to there
    bad: list[str]  # "name<tab>reason" of the examples that were left out


class Shards:
    """The finished shards in a folder, and the next one."""

    def __init__(self, name: str, folder: Path, collection: Collection):
        """Finds the shards to go on from, and removes what else lies in the folder.

        They are those before the first that is damaged, or of parts that have changed.
        """
        self._name, self._folder, self._parts = name, folder, collection.splits
        self.finished: list[Shard] = []
        progress, kept = folder / PROGRESS, {folder / PROGRESS, folder / LOCK}
        for line in json.loads(progress.read_text()) if progress.exists() else []:
            shard = Shard(**{**line, "place": Place(*line["place"])})
            path = self._next_path(shard.split)
            if shard.history != self._history(shard) or count_examples(path) != shard.examples:
                break
            kept.add(path)
            self.finished.append(shard)
        for path in set(folder.iterdir()) - kept:
            path.unlink()

    def of(self, split: str) -> list[Shard]:
        """The finished shards of a split."""
        return [shard for shard in self.finished if shard.split == split]

    def place(self, split: str) -> Place:
        """Where a split goes on."""
        mine = self.of(split)
        return mine[-1].place if mine else START

    def bad(self) -> list[str]:
        """The examples that were left out, as "name<tab>reason"."""
        return [line for shard in self.finished for line in shard.bad]

    def template(self, split: str) -> tfds.core.ShardedFileTemplate:
        """TFDS's way to name the files of a split."""
        return tfds.core.ShardedFileTemplate(
            dataset_name=self._name,
            data_dir=self._folder,
            split=split,
            filetype_suffix=FORMAT.file_suffix,
            template=_TEMPLATE,
        )

    def write(self, split: str, examples: Iterator[Checked]) -> bool:
        """Writes the next shard of a split and its line; False where no example is left."""
        path = self._next_path(split)
        shard = _write(path, split, examples)
        if shard is None:
            return False
        self.finished.append(shard._replace(history=self._history(shard)))
        with _disk(self._folder):
            new = self._folder / "progress.new"
            new.write_text(json.dumps([shard._asdict() for shard in self.finished]))
            os.replace(new, self._folder / PROGRESS)
        return True

    def _next_path(self, split: str) -> Path:
        number = sum(shard.examples > 0 for shard in self.of(split))
        path = self.template(split).sharded_filepath(shard_index=number, num_shards=None)
        return Path(path)

    def _history(self, shard: Shard) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts.get(shard.split, [])[: shard.place.part + 1]:
            digest.update(f"{part.stamp}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def count_examples(path: Path) -> int:
    """Examples of a shard; 0 where there is none, or a broken one."""
    if not path.exists():
        return 0
    reader = array_record_module.ArrayRecordReader(str(path))
    count = reader.num_records()
    try:
        reader.close()
    except RuntimeError:  # only now does ArrayRecord say that it could not read
        return 0
    return count


def _write(path: Path, split: str, examples: Iterator[Checked]) -> Shard | None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    count = size = classes = 0
    place, bad, writer = None, [], None
    for one in examples:
        place = one.place
        if one.bad:
            bad.append(one.bad)
            continue
        with _disk(path):
            # Group size 1, as TFDS has it, makes every example readable by itself.
            writer = writer or array_record_module.ArrayRecordWriter(
                str(unfinished), "group_size:1"
            )
            writer.write(one.example)
        count, size = count + 1, size + len(one.example)
        classes = max(classes, one.label + 1)
        if count == SHARD_EXAMPLES or size >= SHARD_BYTES:
            break
    if place is None:
        return None
    if writer:
        with _disk(path):
            writer.close()
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            unfinished.rename(path)
    return Shard(split, count, size, classes, place, "", bad)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # ArrayRecord's way to say so, and Python's
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be written ({reason}): make room, or mend it.") from None
