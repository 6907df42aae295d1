"""`beit_jax.prepare` from TFRecord and parquet: the same bytes and labels, and clear failures."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from archive_makers import (
    cut,
    make_parquet,
    make_tfrecord,
    names_of,
    picture,
    refused,
    run,
    written,
)
from tensorboardX import crc32c as other_crc32c

from beit_jax import prepare
from beit_jax.data.archives.crc32c import crc32c
from beit_jax.data.sources import open_source

FEATURES = tfds.features.FeaturesDict(
    {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "file_name": tfds.features.Text(),
        "boxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
    }
)


def old_example(seed: int) -> bytes:
    box = tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.5, xmax=0.6 + seed / 1000)
    example = {"image": picture(seed), "label": seed % 2, "file_name": f"{seed}.jpg"}
    return FEATURES.serialize_example({**example, "boxes": [box] * (seed % 3)})


@pytest.fixture
def old(tmp_path):
    """A TFDS data set in TFRecord files: its folder and serialised examples."""
    train = [[old_example(i) for i in range(5)], [old_example(i) for i in range(5, 8)]]
    splits = {"train": train, "test": [[old_example(9)]]}
    folder = tmp_path / "old/5.1.0"
    make_tfrecord(folder, splits, FEATURES)
    return folder, splits


# TFRecord


def test_tfrecord_is_copied_byte_for_byte(tmp_path, old):
    folder, splits = old
    assert run(tmp_path, "tfrecord", folder, "--name=old") == 0
    builder = tfds.builder_from_directory(str(tmp_path / "tfds/old/1.0.0"))
    for split, there in splits.items():
        source = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        assert list(source) == [example for shard in there for example in shard]
    assert builder.info.features.to_json() == FEATURES.to_json()
    assert builder.info.features["label"].names == ["cat", "dog"]
    assert written(tmp_path / "tfds", "old", "test") == [("9.jpg", picture(9), 1)]


def test_what_was_copied_is_read_though_newer_tfrecord_lies_beside(tmp_path, old):
    folder, _ = old
    arguments = ["tfrecord", str(folder), "--name=old", f"--data_dir={tmp_path}"]
    assert prepare.main(arguments) == 0
    assert len(open_source("tfds:old", "train", data_dir=str(tmp_path))) == 8


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-3]), ["00000-of-00002 is cut off at byte"]),
        (lambda f: f.write_bytes(f.read_bytes()[:5]), ["00000-of-00002 is cut off"]),
        (lambda f: flip(f, 3), ["00000-of-00002 is cut off"]),
        (lambda f: flip(f, 9), ["00000-of-00002 has a wrong checksum at byte 12"]),
        (lambda f: flip(f, 700), ["00000-of-00002 has a wrong checksum at byte 12"]),
        (lambda f: f.unlink(), ["00000-of-00002 is missing"]),
        (lambda f: f.write_bytes(b""), ["00000-of-00002 has 0 examples", "say 5"]),
        (lambda f: (f.parent / "dataset_info.json").unlink(), ["no dataset_info.json"]),
    ],
)
def test_damaged_tfrecord_is_one_sentence(tmp_path, capsys, old, harm, words):
    folder, _ = old
    harm(folder / "old-train.tfrecord-00000-of-00002")
    refused(tmp_path, capsys, words, "tfrecord", folder, "--name=x")


def flip(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_checksum_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's
    assert crc32c(bytes(32)) == 0x8A9136AA
    for length in (0, 1, 511, 512, 513, 4096, 70_001):
        data = np.random.default_rng(length).bytes(length)
        assert crc32c(data) == other_crc32c.crc32c(data)


# Parquet


def test_parquet_of_hugging_face(tmp_path):
    folder = tmp_path / "src/data"
    for split, numbers in {"train": range(6), "validation": range(6, 9)}.items():
        images = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in numbers]
        labels = [i % 2 for i in numbers]
        make_parquet(folder / f"{split}-00000-of-00001.parquet", images, labels, ("cat", "a, b"))
    assert run(tmp_path, "parquet", tmp_path / "src", "--name=p") == 0
    expected = [(f"{i}.jpg", picture(i), i % 2) for i in range(6)]
    assert written(tmp_path / "tfds", "p", "train") == expected
    assert len(written(tmp_path / "tfds", "p", "validation")) == 3
    assert names_of(tmp_path, "p") == ("cat", "a, b")


def test_parquet_without_labels_paths_or_splits(tmp_path, capsys):
    images = [{"bytes": picture(i), "path": None} for i in range(20)]
    images[3] = {"bytes": None, "path": "far/away.jpg"}
    make_parquet(tmp_path / "src/0000.parquet", images, None)
    assert run(tmp_path, "parquet", tmp_path / "src", "--name=p", "--holdout=0.3") == 0
    both = [
        row for split in ("train", "validation") for row in written(tmp_path / "tfds", "p", split)
    ]
    assert sorted(row[1] for row in both) == sorted(picture(i) for i in range(20) if i != 3)
    assert {label for *_, label in both} == {-1} and ("0000.parquet, row 5" in {r[0] for r in both})
    assert "1 of 20 images" in capsys.readouterr().out


def test_parquet_labels_without_names_are_numbers(tmp_path):
    images = [{"bytes": picture(i), "path": None} for i in range(3)]
    make_parquet(tmp_path / "train.parquet", images, [0, None, 4])
    assert run(tmp_path, "parquet", tmp_path / "train.parquet", "--name=p", "--holdout=0") == 0
    assert [label for *_, label in written(tmp_path / "tfds", "p", "train")] == [0, -1, 4]
    assert names_of(tmp_path, "p") == ("0", "1", "2", "3", "4")


def test_mistakes_with_parquet_are_one_sentence(tmp_path, capsys):
    images = [{"bytes": picture(i), "path": None} for i in range(9)]
    source = tmp_path / "src"
    make_parquet(source / "train-0.parquet", images, [0] * 9, ("a",))
    refused(tmp_path, capsys, ["no .parquet file below"], "parquet", tmp_path / "none", "--name=x")
    cut(source / "train-0.parquet", -4)
    refused(tmp_path, capsys, ["train-0.parquet", "damaged"], "parquet", source, "--name=x")
    make_parquet(source / "train-0.parquet", images, [0] * 9, ("a",))
    make_parquet(source / "train-1.parquet", images, [0] * 9, ("b",))
    words = ["train-1.parquet has other columns or class names"]
    refused(tmp_path, capsys, words, "parquet", source, "--name=x")
    (source / "train-1.parquet").unlink()
    data = bytearray((source / "train-0.parquet").read_bytes())
    data[4:400] = bytes(396)  # the first page's head
    (source / "train-0.parquet").write_bytes(data)
    refused(tmp_path, capsys, ["train-0.parquet", "damaged"], "parquet", source, "--name=x")


def test_an_address_is_refused_with_what_to_mount(tmp_path, capsys):
    refused(tmp_path, capsys, ["gcsfuse"], "parquet", "gs://bucket/data", "--name=x")
    assert prepare.main(["digits", "--data_dir=gs://bucket/tfds"]) == 1
    assert "gcsfuse" in capsys.readouterr().err
