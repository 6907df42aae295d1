"""TFDS data sets written as ArrayRecord: all or nothing, and on from where an earlier run was.

A data set grows beside its place, in a folder that TFDS and `find_dataset` ignore by its name, and
which is renamed when all is there.
"""

import contextlib
import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from beit_jax.data.checked import Checked, Place, checked
from beit_jax.data.collection import Collection, Part
from beit_jax.data.shards import FORMAT, LOCK, PROGRESS, Shards, count_examples
from beit_jax.data.tfds_store import VERSION, dataset_dir
from beit_jax.errors import UserError

BAD_FILES = "bad_files.txt"
_INCOMPLETE = f"incomplete.{VERSION}_"

Show = Callable[[str, float, int], None]  # of a split: parts read so far, and images written


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
        shards = Shards(name, folder, collection)
        for split, parts in collection.splits.items():
            with contextlib.closing(checked(parts, shards.place(split), workers)) as examples:
                images = sum(shard.examples for shard in shards.of(split))
                watched = _watched(examples, images, split, parts, show)
                while shards.write(split, watched):
                    pass
        _write_bad_files(folder, shards)
        counts = _write_metadata(name, folder, collection, shards)
        _publish(folder, target)
    return Written(target, counts, len(shards.bad()))


def interrupted(name: str, data_dir: str, origin: str) -> bool:
    """Whether a run of this origin left shards from which `write_dataset` goes on."""
    return (_work_folder(dataset_dir(name, data_dir), origin) / PROGRESS).exists()


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
        lock = open(folder / LOCK, "w")
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written ({error.strerror}): choose a folder for TFDS data "
            "sets by config.data.data_dir, by --data_dir of beit_jax.prepare or by $TFDS_DATA_DIR."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another run is writing {folder} ({error.strerror}): wait for it, or end it."
            ) from None
        try:
            yield folder
        finally:
            if not (origin and (folder / PROGRESS).exists()):
                shutil.rmtree(folder, ignore_errors=True)


def _watched(examples, images: int, split: str, parts: Sequence[Part], show: Show):
    """The examples, and what a person sees of them."""

    def parts_read(place: Place) -> float:
        length = parts[place.part].length
        return place.part + (place.item / length if length else 0)

    def watched() -> Iterator[Checked]:
        count = images
        for example in examples:
            count += not example.bad
            show(split, parts_read(example.place), count)
            yield example
        show(split, len(parts), count)

    return watched()


def _write_bad_files(folder: Path, shards: Shards) -> None:
    """Lists what was left out; raises UserError where that is all."""
    bad = shards.bad()
    if bad and not any(shard.examples for shard in shards.finished):
        (folder / PROGRESS).unlink()  # nothing to go on from
        name, reason = bad[0].split("\t")
        raise UserError(
            f"none of the {len(bad):,} images can be read; the first is {name}: {reason}."
        )
    if bad:
        text = "".join(f"{line}\n" for line in bad)
        (folder / BAD_FILES).write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_metadata(name: str, folder: Path, collection, shards: Shards) -> dict[str, int]:
    """Writes TFDS's metadata, reads all back, and returns the images of each split."""
    splits = []
    for split in collection.splits:
        mine = [shard for shard in shards.of(split) if shard.examples]
        if mine:
            lengths, size = [shard.examples for shard in mine], sum(shard.bytes for shard in mine)
            template = shards.template(split)
            splits.append(tfds.core.SplitInfo(split, lengths, size, filename_template=template))
    identity = tfds.core.dataset_builder.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=collection.layout.features(max(shard.classes for shard in shards.finished)),
        description=collection.description or f"Written by beit_jax from {name}.",
    )
    info.set_file_format(FORMAT)
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)
    return _verified(folder, {split.name: split.num_examples for split in splits})


def _verified(folder: Path, counts: dict[str, int]) -> dict[str, int]:
    """The counts, as they are on the disk too."""
    splits = tfds.builder_from_directory(str(folder)).info.splits
    for split, count in counts.items():
        there = sum(count_examples(Path(path)) for path in splits[split].filepaths)
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
        (folder / PROGRESS).unlink()  # another process was the first to finish
    else:
        for left in (PROGRESS, LOCK):
            (target / left).unlink(missing_ok=True)
