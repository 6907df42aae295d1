"""An interrupted `beit_jax.prepare` goes on where it was, and its result is the same."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from archive_makers import make_imagenet, make_parquet, make_tfrecord, picture, tar_bytes, written

from beit_jax import prepare
from beit_jax.data import checked, shards, tfds_writer
from beit_jax.data.sources import open_source
from beit_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SHARD = 4  # examples of a shard in these tests


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_EXAMPLES", SHARD)


def run(source: Path, data_dir: Path, kind: str = "imagenet", workers: int = 2) -> int:
    flags = [kind, str(source), "--name=data", f"--data_dir={data_dir}", f"--workers={workers}"]
    return prepare.main(flags + ["--holdout=0.3"] * (kind in ("folder", "webdataset")))


def make(kind: str, root: Path) -> Path:
    """About 20 images, one of them bad; returns what to name as SRC."""
    files = {f"{i}.jpg": picture(i) if i != 3 else b"nothing" for i in range(20)}
    if kind == "imagenet":
        make_imagenet(root)
    elif kind == "tfrecord":
        features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
        rows = [features.serialize_example({"image": data}) for data in files.values()]
        files = {"train": [rows[:7], rows[7:14]], "test": [rows[14:]]}
        make_tfrecord(root / "old", files, features)
        return root / "old"
    elif kind == "parquet":
        images = [{"bytes": data, "path": name} for name, data in files.items()]
        make_parquet(root / "train-0.parquet", images[:13], None)
        make_parquet(root / "test-0.parquet", images[13:], None)
    elif kind == "webdataset":
        root.mkdir()
        for number in range(2):
            some = dict(list(files.items())[number::2])
            (root / f"{number}.tar").write_bytes(tar_bytes(some))
    else:
        root.mkdir()
        for name, data in files.items():
            (root / name).write_bytes(data)
    return root


def contents(data_dir: Path) -> dict[str, bytes]:
    """Every file of the data set but TFDS's metadata, which name the folder's place."""
    folder = data_dir / "data/1.0.0"
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".json"}


class Reads:
    """Counts the images that are read, and interrupts at one of them."""

    def __init__(self, monkeypatch, stop: int | None = None):
        self.count, self._stop, self._read = 0, stop, checked.read_pixels
        monkeypatch.setattr(checked, "read_pixels", self)

    def __call__(self, image):
        self.count += 1
        if self.count == self._stop:
            raise KeyboardInterrupt
        return self._read(image)


@pytest.fixture
def interrupt(monkeypatch):
    """Runs with an interrupt at the n-th image; returns the exit status."""

    def interrupted(stop: int, *arguments) -> int:
        with monkeypatch.context() as patch:
            Reads(patch, stop)
            return run(*arguments, workers=1)  # so that the n-th is always the same

    return interrupted


@pytest.mark.parametrize("kind", ["imagenet", "tfrecord", "webdataset", "parquet", "folder"])
@pytest.mark.parametrize("stop", [1, 6, 11, 16])
def test_the_result_is_the_same(tmp_path, monkeypatch, interrupt, capsys, kind, stop):
    source = make(kind, tmp_path / "src")
    assert run(source, tmp_path / "whole", kind) == 0
    assert interrupt(stop, source, tmp_path / "parts", kind) == 130
    assert "the same command, given again" in capsys.readouterr().err
    with pytest.raises(UserError, match="not prepared"):
        open_source("tfds:data", "train", data_dir=str(tmp_path / "parts"))
    reads = Reads(monkeypatch)
    assert run(source, tmp_path / "parts", kind) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    images = 17 if kind == "imagenet" else 20
    assert images - stop < reads.count <= images - max(0, stop - 1 - SHARD - 1)
    assert [p.name for p in (tmp_path / "parts/data").iterdir()] == ["1.0.0"]
    if stop > SHARD + 2:
        assert "going on from what an interrupted run finished" in capsys.readouterr().out


def test_interrupted_again_and_again(tmp_path, interrupt):
    source = make("imagenet", tmp_path / "src")
    assert run(source, tmp_path / "whole") == 0
    runs = 0
    while interrupt(7, source, tmp_path / "parts"):
        runs += 1
    assert 2 <= runs <= 5
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("place", ["before its line", "after its line", "before the renaming"])
def test_stopped_between_two_steps(tmp_path, monkeypatch, place):
    source = make("imagenet", tmp_path / "src")
    assert run(source, tmp_path / "whole") == 0
    replace, calls = os.replace, []

    def stopping(*names):
        calls.append(names)
        if len(calls) == 2 and place == "after its line":
            replace(*names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*names)

    def stop(*names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "before the renaming":
            patch.setattr(tfds_writer, "_publish", stop)
        else:
            patch.setattr(os, "replace", stopping)
        assert run(source, tmp_path / "parts") == 130
    reads = Reads(monkeypatch)
    assert run(source, tmp_path / "parts") == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert (
        reads.count == {"before its line": 13, "after its line": 9, "before the renaming": 0}[place]
    )


def left_folder(data_dir: Path) -> Path:
    return next((data_dir / "data").glob("incomplete.*"))


def test_a_damaged_shard_is_written_again(tmp_path, monkeypatch, interrupt):
    source = make("imagenet", tmp_path / "src")
    assert run(source, tmp_path / "whole") == 0
    assert interrupt(16, source, tmp_path / "parts") == 130
    second = sorted(left_folder(tmp_path / "parts").glob("*-train*"))[1]
    second.write_bytes(second.read_bytes()[:-100])
    reads = Reads(monkeypatch)
    assert run(source, tmp_path / "parts") == 0
    assert reads.count == 17 - SHARD  # the first shard alone was good
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_what_comes_from_other_parts_is_not_kept(tmp_path, interrupt):
    """One of two TFRecord files is another than when the run was interrupted."""
    source = make("tfrecord", tmp_path / "src")
    assert interrupt(14, source, tmp_path / "parts", "tfrecord") == 130
    file = next(source.glob("*train*-00000-of-*"))
    other = next(source.glob("*train*-00001-of-*"))
    file.write_bytes(other.read_bytes())
    os.utime(file, (1, 1))
    assert run(source, tmp_path / "parts", "tfrecord") == 0
    assert run(source, tmp_path / "whole", "tfrecord") == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_no_shard_of_a_larger_source_stays(tmp_path, interrupt):
    source = make("folder", tmp_path / "src")
    assert interrupt(13, source, tmp_path / "parts", "folder") == 130
    for number in range(4, 18):
        (source / f"{number}.jpg").unlink()
    assert run(source, tmp_path / "parts", "folder") == 0
    assert run(source, tmp_path / "whole", "folder") == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_another_source_starts_anew_and_says_what_lies_there(tmp_path, interrupt, capsys):
    source, other = (make("folder", tmp_path / name) for name in ("a", "b"))
    assert interrupt(14, source, tmp_path / "tfds", "folder") == 130
    left = left_folder(tmp_path / "tfds")
    capsys.readouterr()
    assert run(other, tmp_path / "tfds", "folder") == 0
    assert f"{left} is of another run" in capsys.readouterr().out
    assert left.exists() and len(written(tmp_path / "tfds", "data", "train")) > 9


def test_two_runs_at_once_are_refused(tmp_path, interrupt, capsys):
    source = make("imagenet", tmp_path / "src")
    assert interrupt(14, source, tmp_path / "tfds") == 130
    with open(left_folder(tmp_path / "tfds") / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(source, tmp_path / "tfds") == 1
    assert "another run is writing" in capsys.readouterr().err
    assert run(source, tmp_path / "tfds") == 0


def test_lost_data_is_seen_in_the_end(tmp_path, monkeypatch, capsys):
    """A file system that loses a shard after it was written."""
    source = make("imagenet", tmp_path / "src")

    def losing(name, folder, *others):
        next(folder.glob("data-validation*")).write_bytes(b"")
        return finish(name, folder, *others)

    finish = tfds_writer._write_metadata
    monkeypatch.setattr(tfds_writer, "_write_metadata", losing)
    assert run(source, tmp_path / "tfds") == 1
    assert "1 images of validation where 5 were written" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(source, tmp_path / "tfds") == 0  # the good shards are kept


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, *arguments):
            raise RuntimeError("write() failed: No space left on device")

    source = make("folder", tmp_path / "src")
    monkeypatch.setattr(shards.array_record_module, "ArrayRecordWriter", Full)
    assert run(source, tmp_path / "tfds", "folder") == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "No space left on device" in said


def test_a_killed_run_goes_on(tmp_path, capsys):
    """Killed at once, with no chance to tidy up, and with a shard half written."""
    source = make("folder", tmp_path / "src")
    assert run(source, tmp_path / "whole", "folder") == 0
    flags = ["folder", str(source), "--name=data", f"--data_dir={tmp_path / 'parts'}"]
    killed = f"""
import os, signal
from beit_jax import prepare
from beit_jax.data import shards
shards.SHARD_EXAMPLES = {SHARD}
count = [0]
class Writer(shards.array_record_module.ArrayRecordWriter):
    def write(self, example):
        count[0] += 1
        if count[0] == {2 * SHARD + 2}:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(example)
shards.array_record_module.ArrayRecordWriter = Writer
prepare.main({[*flags, "--holdout=0.3"]})
"""
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == -9
    assert list(left_folder(tmp_path / "parts").glob("*.unfinished"))
    assert run(source, tmp_path / "parts", "folder") == 0
    assert "going on from what an interrupted run finished" in capsys.readouterr().out
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
