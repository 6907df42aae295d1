"""TFDS data sets written as ArrayRecord: all or nothing, and from where an interrupted run was.

A data set grows beside its place, in a folder that TFDS and `find_dataset` ignore by its name. A
shard gets its own name when it is complete, and then its line in progress.json, which says where
its split goes on. The folder is renamed when all is there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from beit_jax.data.checked import START, Checked, Place, checked
from beit_jax.data.collection import Collection, Part
from beit_jax.data.tfds_store import VERSION, dataset_dir
from beit_jax.errors import UserError

SHARD_EXAMPLES = 10_000
SHARD_BYTES = 1 << 30  # a shard ends with whichever is reached first
BAD_FILES = "bad_files.txt"
_INCOMPLETE = f"incomplete.{VERSION}_"
_PROGRESS = "progress.json"
_LOCK = ".lock"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
_FORMAT = tfds.core.FileFormat.ARRAY_RECORD

Show = Callable[[str, float, int], None]  # of a split: parts read so far, and images written


class Shard(NamedTuple):
    """A finished shard; without examples where a split's last images were all bad."""

    split: str
    examples: int
    bytes: int
    classes: int  # that its labels need
    place: Place  # of the split, behind it
    history: str  # hash of the parts of the split up to there
    bad: list[str]  # "name<tab>reason" of the examples that were left out


class Written(NamedTuple):
    """What became of a collection."""

    folder: Path
    counts: dict[str, int]  # images of each split
    bad: int  # images that were left out, listed in the folder's bad_files.txt


def write_dataset(
    name: str,
    data_dir: str,
    collection: Collection,
    *,
    origin: str = "",
    workers: int = 1,
    show: Show = lambda split, parts, images: None,
) -> Written:
    """Writes a collection as the TFDS data set `name`, all or nothing.

    With an `origin`, which says what is written in which way, an interrupted run leaves its
    finished shards, and one of the same origin goes on from them as long as the parts that they
    come from are the same. Without, nothing is left, and of several processes that write
    the same data set the first to finish wins and the others' work is dropped.

    Raises:
        UserError: the name is none that TFDS takes, nothing can be written there, another process
            is at it, a part is damaged, or no image can be read.
    """
    target = dataset_dir(name, data_dir)
    with _workplace(target, origin) as folder:
        shards = _finished(name, folder, collection)
        _clear(name, folder, shards)
        for split, parts in collection.splits.items():
            _write_split(name, folder, split, parts, shards, workers, show)
        _refuse_all_bad(folder, shards)
        bad = _write_bad_files(folder, shards)
        counts = _finish(name, folder, collection, shards)
        _publish(folder, target)
    return Written(target, counts, bad)


def interrupted(name: str, data_dir: str, origin: str) -> bool:
    """Whether a run of this origin left shards from which `write_dataset` goes on."""
    return (_work_folder(dataset_dir(name, data_dir), origin) / _PROGRESS).exists()


def leftovers(name: str, data_dir: str, origin: str) -> list[Path]:
    """What killed writers of other origins left, or what is being written now."""
    target = dataset_dir(name, data_dir)
    found = target.parent.glob(f"{_INCOMPLETE}*")
    return sorted(set(found) - {_work_folder(target, origin)})


def _work_folder(target: Path, origin: str) -> Path:
    digest = hashlib.blake2b(origin.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return target.parent / (_INCOMPLETE + digest)


@contextlib.contextmanager
def _workplace(target: Path, origin: str) -> Iterator[Path]:
    """The folder to write in, which only finished shards outlive."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if origin:
            folder = _work_folder(target, origin)
            folder.mkdir(exist_ok=True)
        else:
            folder = Path(tempfile.mkdtemp(prefix=_INCOMPLETE, dir=target.parent))
            folder.chmod(0o755)
        lock = open(folder / _LOCK, "w")
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written ({error.strerror}): choose a folder for TFDS data "
            "sets by config.data.data_dir, by --data_dir of beit_jax.prepare or by $TFDS_DATA_DIR."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {folder}: wait for it, or end it.") from None
        try:
            yield folder
        finally:
            if not (origin and (folder / _PROGRESS).exists()):
                shutil.rmtree(folder, ignore_errors=True)


def _history(parts: Sequence[Part], place: Place) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts[: place.part + 1]:
        digest.update(f"{part.stamp}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _finished(name: str, folder: Path, collection: Collection) -> list[Shard]:
    """The shards to go on from: those before the first that is damaged or of changed parts."""
    try:
        lines = json.loads((folder / _PROGRESS).read_text())
    except FileNotFoundError:
        lines = []
    found: list[Shard] = []
    for line in lines:
        shard = Shard(**{**line, "place": Place(*line["place"])})
        parts = collection.splits.get(shard.split, [])
        path = _shard_path(name, folder, shard.split, found)
        if shard.history != _history(parts, shard.place) or _count(path) != shard.examples:
            break
        found.append(shard)
    return found


def _clear(name: str, folder: Path, shards: Sequence[Shard]) -> None:
    """Removes what an interrupted run left beside its finished shards."""
    kept = {folder / _LOCK, folder / _PROGRESS}
    for number, shard in enumerate(shards):
        kept.add(_shard_path(name, folder, shard.split, shards[:number]))
    for path in set(folder.iterdir()) - kept:
        path.unlink()


def _count(path: Path) -> int:
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


def _shard_path(name: str, folder: Path, split: str, shards: Sequence[Shard]) -> Path:
    """The file of the shard that follows some shards."""
    number = sum(bool(shard.examples) for shard in shards if shard.split == split)
    return _template(name, folder, split).sharded_filepath(shard_index=number, num_shards=None)


def _template(name: str, folder: Path, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        dataset_name=name,
        data_dir=folder,
        split=split,
        filetype_suffix=_FORMAT.file_suffix,
        template=_TEMPLATE,
    )


def _write_split(name, folder, split, parts, shards: list[Shard], workers: int, show: Show) -> None:
    """Writes what is still missing of a split, and adds its shards to those finished."""
    done = [shard for shard in shards if shard.split == split]
    place = done[-1].place if done else START
    images = sum(shard.examples for shard in done)
    with contextlib.closing(checked(parts, place, workers)) as examples:
        watched = _watched(examples, images, split, parts, show)
        while shard := _write_shard(_shard_path(name, folder, split, shards), split, watched):
            shards.append(shard._replace(history=_history(parts, shard.place)))
            with _disk(folder):
                text = json.dumps([shard._asdict() for shard in shards])
                (folder / "progress.new").write_text(text)
                os.replace(folder / "progress.new", folder / _PROGRESS)


def _watched(examples, images: int, split: str, parts, show: Show) -> Iterator[Checked]:
    for example in examples:
        images += not example.bad
        show(split, _parts_read(parts, example.place), images)
        yield example
    show(split, len(parts), images)


def _parts_read(parts: Sequence[Part], place: Place) -> float:
    length = parts[place.part].length
    return place.part + (place.item / length if length else 0)


def _write_shard(path: Path, split: str, examples: Iterator[Checked]) -> Shard | None:
    """Writes the next shard; None where no example is left."""
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


def _refuse_all_bad(folder: Path, shards: Sequence[Shard]) -> None:
    bad = [line for shard in shards for line in shard.bad]
    if bad and not any(shard.examples for shard in shards):
        (folder / _PROGRESS).unlink()  # nothing to go on from
        name, reason = bad[0].split("\t")
        raise UserError(
            f"none of the {len(bad):,} images can be read; the first is {name}: {reason}."
        )


def _write_bad_files(folder: Path, shards: Sequence[Shard]) -> int:
    bad = [line for shard in shards for line in shard.bad]
    if bad:
        text = "".join(f"{line}\n" for line in bad)
        (folder / BAD_FILES).write_text(text, encoding="utf-8", errors="backslashreplace")
    return len(bad)


def _finish(name: str, folder: Path, collection: Collection, shards) -> dict[str, int]:
    """Writes TFDS's metadata, reads all back, and returns the images of each split."""
    splits = []
    for split in collection.splits:
        mine = [shard for shard in shards if shard.split == split and shard.examples]
        if mine:
            lengths = [shard.examples for shard in mine]
            size = sum(shard.bytes for shard in mine)
            template = _template(name, folder, split)
            splits.append(tfds.core.SplitInfo(split, lengths, size, filename_template=template))
    identity = tfds.core.dataset_builder.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=collection.layout.features(max(shard.classes for shard in shards)),
        description=collection.description or f"Written by beit_jax from {name}.",
    )
    info.set_file_format(_FORMAT)
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)
    return _verified(folder, {split.name: split.num_examples for split in splits})


def _verified(folder: Path, counts: dict[str, int]) -> dict[str, int]:
    """The counts, as they are on the disk too."""
    splits = tfds.builder_from_directory(str(folder)).info.splits
    for split, count in counts.items():
        there = sum(_count(Path(path)) for path in splits[split].filepaths)
        if there != count:
            raise UserError(
                f"{folder} has {there:,} images of {split} where {count:,} were written: the disk "
                "or its file system loses data; choose another --data_dir."
            )
    return counts


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not (target / "dataset_info.json").exists():
            raise
        (folder / _PROGRESS).unlink()  # another process was the first to finish
    else:
        for left in (_LOCK, _PROGRESS):
            (target / left).unlink(missing_ok=True)
