"""`beit_jax.prepare` from tar files: the same bytes and labels, and one sentence where it fails."""

import io
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from archive_makers import (
    WNIDS,
    cut,
    make_imagenet,
    names_of,
    picture,
    refused,
    run,
    tar_bytes,
    written,
)
from PIL import Image

from beit_jax.data import collection
from beit_jax.data.archives.imagenet import open_imagenet
from beit_jax.data.collection import RecordLayout
from beit_jax.data.decode import read_pixels
from beit_jax.data.record import Record


def shards(tmp_path, count: int = 2, labels: bool = True, names: str = "train-{:04d}.tar"):
    """WebDataset shards of three examples each; the folder, and (file, bytes, label) in order."""
    folder = tmp_path / "shards"
    folder.mkdir()
    rows = []
    for shard in range(count):
        files = {}
        for i in range(3):
            number = 3 * shard + i
            kind = (".jpg", ".png", ".webp")[i]
            rows.append((f"a.b/im{number}{kind}", picture(number, kind=kind), number % 4))
            files[f"a.b/im{number}.json"] = b'{"width": 12}'
            files[rows[-1][0]] = rows[-1][1]
            if labels:
                files[f"a.b/im{number}.cls"] = b"%d\n" % (number % 4)
        (folder / names.format(shard)).write_bytes(tar_bytes(files))
    return folder, rows


# ImageNet


def test_imagenet_from_its_tar_files(tmp_path, capsys):
    there = make_imagenet(tmp_path / "src")
    assert run(tmp_path, "imagenet", tmp_path / "src") == 0
    for split, rows in there.items():
        expected = [(name, data, WNIDS.index(wnid)) for name, data, wnid in rows]
        assert written(tmp_path / "tfds", "imagenet2012", split) == expected
    assert names_of(tmp_path, "imagenet2012") == WNIDS
    assert "12 images of train, 5 images of validation" in capsys.readouterr().out
    folder = tmp_path / "tfds/imagenet2012/1.0.0"
    assert not {path.name for path in folder.iterdir()} & {".lock", "progress.json"}


def test_imagenet_has_the_features_of_tfds_and_is_read_by_it(tmp_path):
    there = make_imagenet(tmp_path / "src")
    assert run(tmp_path, "imagenet", tmp_path / "src") == 0
    builder = tfds.builder_from_directory(str(tmp_path / "tfds/imagenet2012/1.0.0"))
    theirs = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(WNIDS)),
            "file_name": tfds.features.Text(),
        }
    )
    assert builder.info.features.to_json() == theirs.to_json()
    source = builder.as_data_source("validation")
    assert len(source) == 5
    for example, (name, data, wnid) in zip(source, there["validation"], strict=True):
        assert example["file_name"] == name.encode()
        assert builder.info.features["label"].int2str(example["label"]) == wnid
        np.testing.assert_array_equal(example["image"], read_pixels(data).values)


def test_without_the_development_kit_tfds_knows_the_labels(tmp_path):
    make_imagenet(tmp_path / "src", devkit=False)
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    inner = {f"{w}.tar": tar_bytes({f"{w}_1.JPEG": picture(1)}) for w in sorted(set(labels))}
    (tmp_path / "src/ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    found = open_imagenet(str(tmp_path / "src"))
    part, classes = found.splits["validation"][0], found.layout.class_names
    order = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    assert part.length == 50_000 and list(classes) == order
    for item, number in zip(part.items(), (5, 4, 3, 2, 1), strict=True):
        assert classes[item.read().label] == labels[number - 1]


def test_imagenets_odd_images_are_readable(tmp_path):
    """In ImageNet one PNG and 22 CMYK images are called .JPEG."""
    colour = np.zeros((32, 32, 3), np.uint8)
    colour[:] = (200, 40, 90)
    buffer = io.BytesIO()
    Image.fromarray(colour).convert("CMYK").save(buffer, "JPEG", quality=95)
    cmyk = buffer.getvalue()
    assert np.abs(read_pixels(cmyk).values.astype(int) - colour).max() < 8
    make_imagenet(tmp_path / "src")
    inner = {f"{wnid}.tar": tar_bytes({"x.JPEG": picture(0)}) for wnid in WNIDS[1:]}
    png = picture(3, kind=".png")
    inner[f"{WNIDS[0]}.tar"] = tar_bytes({"a.JPEG": cmyk, "b.JPEG": png})
    (tmp_path / "src/ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    assert run(tmp_path, "imagenet", tmp_path / "src") == 0
    found = written(tmp_path / "tfds", "imagenet2012", "train")
    assert ("a.JPEG", cmyk, 0) in found and ("b.JPEG", png, 0) in found


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda root: (root / "ILSVRC2012_img_val.tar").unlink(), ["img_val.tar is missing",
                                                                   "https://image-net.org"]),
        (lambda root: cut(root / "ILSVRC2012_img_train.tar", 20_000), ["img_train.tar", "cut off"]),
        (lambda root: cut(root / "ILSVRC2012_img_val.tar", -9000), ["img_val.tar", "cut off"]),
        (lambda root: cut(root / "ILSVRC2012_devkit_t12.tar.gz", 99), ["devkit", "cannot be read"]),
        (lambda root: make_imagenet(root, devkit=False) and keep(root, 4), ["img_val.tar has 4",
                                                                           "say 5"]),
        (lambda root: (root / "ILSVRC2012_img_train.tar").write_bytes(b"no tar" * 999),
         ["img_train.tar is no tar file"]),
        (lambda root: (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes({"x.JPEG": b"x"})),
         ["img_val.tar holds 'x.JPEG'"]),
    ],
)  # fmt: skip
def test_damaged_imagenet_is_one_sentence(tmp_path, capsys, harm, words):
    make_imagenet(tmp_path / "src")
    harm(tmp_path / "src")
    refused(tmp_path, capsys, words, "imagenet", tmp_path / "src")


def keep(root, count: int) -> None:
    files = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture(i) for i in range(count)}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(files))


# Tar files in general


def hostile_tar(image: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        kinds = {
            "/dev/x": tarfile.CHRTYPE,
            "link.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
        }
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ("../../up.jpg", "/abs.jpg", "ok.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            archive.addfile(info, io.BytesIO(image))
    return buffer.getvalue()


def test_a_hostile_tar_writes_nothing_and_reads_only_its_own_files(tmp_path):
    (tmp_path / "src/deep/er").mkdir(parents=True)
    (tmp_path / "src/deep/er/x.tar").write_bytes(hostile_tar(picture(1)))
    before = sorted(tmp_path.rglob("*"))
    assert run(tmp_path, "webdataset", tmp_path / "src", "--name=x", "--holdout=0") == 0
    assert [name for name, *_ in written(tmp_path / "tfds", "x", "train")] == [
        "../../up.jpg",
        "/abs.jpg",
        "ok.jpg",
    ]
    assert not (tmp_path / "tfds/x/1.0.0/bad_files.txt").exists()
    after = sorted(path for path in tmp_path.rglob("*") if "tfds" not in path.parts[-4:])
    assert [p for p in after if not p.is_relative_to(tmp_path / "tfds")] == before


def broken_tars() -> dict[str, bytes]:
    good = tar_bytes({"1.jpg": picture(1), "2.jpg": picture(2)})
    size = tarfile.TarInfo("huge.jpg")
    size.size = 1 << 40
    longname = tarfile.TarInfo("././@LongLink")
    longname.type, longname.size = tarfile.GNUTYPE_LONGNAME, 1 << 32
    backwards = bytearray(size.tobuf(tarfile.GNU_FORMAT))
    backwards[124:136] = (-512).to_bytes(12, "big", signed=True)
    backwards[148:156] = b" " * 8
    backwards[148:156] = b"%06o\0 " % sum(backwards[:512])
    chain = tarfile.TarInfo("x")
    chain.type, chain.size = tarfile.GNUTYPE_LONGNAME, 1
    return {
        "no end": good[: -(len(good) % 10240 or 10240)].rstrip(b"\0"),
        "half": good[:1400],
        "damaged header": good.replace(b"2.jpg", b"3.jpg"),
        "huge member": size.tobuf() + bytes(2048),
        "huge name": longname.tobuf() + bytes(4096),
        "long name": tar_bytes({"x" * (1 << 21) + ".jpg": picture(1)}),
        "in a circle": good[: good.index(b"2.jpg")] + bytes(backwards) + good,
        "chain of names": (chain.tobuf() + b"a" + bytes(511)) * 3000 + good,
    }


@pytest.mark.parametrize("kind", broken_tars())
def test_a_broken_tar_is_named_in_one_sentence(tmp_path, capsys, kind):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/bad.tar").write_bytes(broken_tars()[kind])
    refused(tmp_path, capsys, ["bad.tar", "damaged or cut off"], "webdataset", tmp_path / "src",
            "--name=x")  # fmt: skip


# WebDataset


@pytest.mark.parametrize(
    "pattern", ["", "/train-{0000..0001}.tar", "/*.tar", "/{train-0000,train-0001}.tar"]
)
def test_webdataset_shards(tmp_path, pattern):
    folder, rows = shards(tmp_path)
    source = f"{folder}{pattern}"
    assert run(tmp_path, "webdataset", source, "--name=w", "--holdout=0") == 0
    assert written(tmp_path / "tfds", "w", "train") == rows
    assert names_of(tmp_path, "w") == ("0", "1", "2", "3")


def test_webdataset_splits_class_names_and_json_labels(tmp_path):
    folder, rows = shards(tmp_path, count=1)
    (folder / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    held = {"v.jpeg": picture(7), "v.json": b'{"label": 2}'}
    (folder / "imagenet1k-validation-00.tar").write_bytes(tar_bytes(held))
    (folder / "test").mkdir()
    (folder / "test/0.tar").write_bytes(tar_bytes({"t.JPG": picture(8)}))
    assert run(tmp_path, "webdataset", folder, "--name=w") == 0
    assert names_of(tmp_path, "w") == ("ant", "bee", "cat", "dog")
    assert written(tmp_path / "tfds", "w", "train") == rows
    assert written(tmp_path / "tfds", "w", "validation") == [("v.jpeg", picture(7), 2)]
    assert written(tmp_path / "tfds", "w", "test") == [("t.JPG", picture(8), -1)]


def test_webdataset_without_splits_and_labels_is_held_out_from(tmp_path):
    folder, rows = shards(tmp_path, count=8, labels=False, names="{:04d}.tar")
    assert run(tmp_path, "webdataset", folder, "--name=w", "--holdout=0.4") == 0
    train, held = (written(tmp_path / "tfds", "w", split) for split in ("train", "validation"))
    assert sorted(train + held) == sorted((name, data, -1) for name, data, _ in rows)
    assert 3 < len(held) < 17 and names_of(tmp_path, "w") == ()


def test_bad_examples_are_left_out_and_listed(tmp_path, capsys):
    folder, rows = shards(tmp_path, count=1)
    bad = {"1.jpg": b"nothing", "1.cls": b"1", "2.jpg": picture(1), "2.cls": b"two", "3.txt": b"x",
           "4.jpg": picture(4), "4.cls": b"99999999"}  # fmt: skip
    (folder / "train-x.tar").write_bytes(tar_bytes(bad))
    assert run(tmp_path, "webdataset", folder, "--name=w", "--holdout=0") == 0
    assert written(tmp_path / "tfds", "w", "train") == rows
    listing = (tmp_path / "tfds/w/1.0.0/bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listing] == ["1", "2", "3", "4"]
    assert "4 of 7 images cannot be read" in capsys.readouterr().out


def test_a_first_label_that_cannot_be_read_is_a_label(tmp_path):
    (tmp_path / "src").mkdir()
    files = {"1.jpg": picture(1), "1.cls": b"one", "2.jpg": picture(2), "2.cls": b"2"}
    (tmp_path / "src/0.tar").write_bytes(tar_bytes(files))
    assert run(tmp_path, "webdataset", tmp_path / "src", "--name=w", "--holdout=0") == 0
    assert written(tmp_path / "tfds", "w", "train") == [("2.jpg", picture(2), 2)]


def test_the_same_example_is_the_same_bytes():
    """In every process: protocol buffers have no order of their own."""
    layout = RecordLayout(True, ("a", "b"))
    example = layout.item("x", lambda: Record(b"...", 1, "x")).read().example
    places = [example.index(key) for key in (b"file_name", b"image", b"label")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "files, words",
    [
        ({"a.txt": b""}, ["no .tar file below"]),
        ({"train-0.tar": tar_bytes({"a.txt": b""})}, ["no shard in", "holds an image"]),
        ({"train-0.tar": tar_bytes({"a.jpg": picture(1)}), "x.tar": tar_bytes({})},
         ["x.tar names no split"]),
        ({"train-0.tar": tar_bytes({"a.jpg": picture(1), "a.cls": b"2"}), "classes.txt": b"a\nb"},
         ["'a.jpg' has label 2", "2 class names"]),
        ({"train-0.tar": tar_bytes({"a.jpg": picture(1)}), "classes.txt": b"a\na"},
         ["classes.txt names the class 'a' twice"]),
        ({"0.tar": tar_bytes({"a.jpg": picture(1), "b.jpg": picture(1), "b.cls": b"1"})},
         ["'b.jpg' has a label", "label all"]),
    ],
)  # fmt: skip
def test_mistakes_with_shards_are_one_sentence(tmp_path, capsys, files, words):
    (tmp_path / "src").mkdir()
    for name, data in files.items():
        (tmp_path / "src" / name).write_bytes(data)
    refused(tmp_path, capsys, words, "webdataset", tmp_path / "src", "--name=x", "--holdout=0")


def test_a_member_that_is_too_large_is_a_bad_file(tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "MAX_BYTES", 2000)
    (tmp_path / "src").mkdir()
    files = {"1.jpg": picture(1), "2.jpg": picture(1, size=200)}
    (tmp_path / "src/0.tar").write_bytes(tar_bytes(files))
    assert run(tmp_path, "webdataset", tmp_path / "src", "--name=x", "--holdout=0") == 0
    assert [name for name, *_ in written(tmp_path / "tfds", "x", "train")] == ["1.jpg"]
    assert "up to 2,000 are read" in (tmp_path / "tfds/x/1.0.0/bad_files.txt").read_text()
