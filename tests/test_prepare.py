"""`python -m beit_jax.prepare`: what it writes, what it leaves out, how it fails."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from beit_jax import prepare
from beit_jax.data.sources import open_source
from beit_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def jpeg(seed: int, size: int = 16) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def fill(root: Path, *names: str, size: int = 16) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i, size))
    return root


def records(source) -> list:
    return [source[i] for i in range(len(source))]


def test_a_folder_comes_back_byte_for_byte(tmp_path, capsys):
    source = fill(
        tmp_path / "images",
        *(f"train/{kind}/{i}.JPEG" for kind in ("cat", "dog") for i in range(30)),
        *(f"val/dog/{i}.JPEG" for i in range(5)),
    )
    data_dir = str(tmp_path / "tfds")
    assert prepare.main(["folder", str(source), "--name=pets", f"--data_dir={data_dir}"]) == 0
    for split in ("train", "validation"):
        written = open_source("tfds:pets", split, data_dir=data_dir)
        there = open_source(f"folder:{source}", split)
        assert records(written) == records(there)
        assert written.class_names == there.class_names == ("cat", "dog")
        np.testing.assert_array_equal(written.labels(), there.labels())
    printed = capsys.readouterr().out
    assert f"--config.data.source=tfds:pets --config.data.data_dir={data_dir}" in printed


def test_label_maps_are_read_where_they_lie(tmp_path, capsys):
    source = fill(tmp_path / "scenes", "images/a.jpg", "annotations/a.jpg")
    assert prepare.main(["folder", str(source), "--name=x", f"--data_dir={tmp_path}"]) == 1
    assert f"train with --config.data.source=folder:{source}." in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_imagenet_folders_become_what_the_recipes_read(tmp_path):
    source = fill(
        tmp_path / "imagenet", "train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG", "val/n02/v.JPEG"
    )
    data_dir = str(tmp_path)
    with pytest.raises(UserError, match="--name=imagenet2012"):
        open_source("tfds:imagenet2012", "train", data_dir=data_dir)
    arguments = ["folder", str(source), "--name=imagenet2012", f"--data_dir={data_dir}"]
    assert prepare.main(arguments) == 0
    held = open_source("tfds:imagenet2012", "validation", data_dir=data_dir)
    assert held.class_names == ("n01", "n02") and held[0].label == 1


def test_an_unlabelled_folder_is_held_out_from(tmp_path):
    source = fill(tmp_path / "images", *(f"{i}.jpg" for i in range(40)))
    arguments = ["folder", str(source), "--name=flat", f"--data_dir={tmp_path}", "--holdout=0.3"]
    assert prepare.main([*arguments, "--workers=3"]) == 0
    train, held = (
        open_source("tfds:flat", s, data_dir=str(tmp_path)) for s in ("train", "validation")
    )
    assert len(train) + len(held) == 40 and len(held) > 3
    assert train.class_names == () and train[0].label == -1
    there = open_source(f"folder:{source}", "validation", holdout=0.3)
    assert records(held) == records(there)


def test_unreadable_files_are_left_out_and_listed(tmp_path, capsys):
    source = fill(tmp_path / "images", *(f"{i}.jpg" for i in range(30)))
    (source / "7.jpg").write_bytes(b"not an image")
    (source / "8.jpg").write_bytes(jpeg(8)[:-100])
    assert prepare.main(["folder", str(source), "--name=some", f"--data_dir={tmp_path}"]) == 0
    splits = [open_source("tfds:some", s, data_dir=str(tmp_path)) for s in ("train", "validation")]
    names = {record.name for split in splits for record in records(split)}
    assert names == {f"{i}.jpg" for i in range(30)} - {"7.jpg", "8.jpg"}
    listing = tmp_path / "some/1.0.0/bad_files.txt"
    lines = sorted(listing.read_text().splitlines())
    assert [line.split("\t")[0] for line in lines] == ["7.jpg", "8.jpg"]
    assert (
        f"2 of 30 images cannot be read and were left out; see {listing}" in capsys.readouterr().out
    )


def test_digits_under_a_name(tmp_path):
    assert prepare.main(["digits", "--name=numbers", f"--data_dir={tmp_path}"]) == 0
    assert len(open_source("tfds:numbers", "test", data_dir=str(tmp_path))) == 350


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["folder", "{}/nowhere", "--name=x"], ["there is no folder"]),
        (["folder", "{}/texts", "--name=x"], ["no image below", ".txt (1)"]),
        (["folder", "{}/bad", "--name=x"], ["none of the 2 images", "first is"]),
        (["folder", "{}/good", "--name=My Photos"], ["--name=My Photos", "small letters"]),
        (["folder", "{}/good", "--name=taken"], ["is there already", "--name"]),
        (["folder", "{}/good", "--name=x", "--holdout=2"], ["holdout"]),
        (["folder", "{}/good", "--name=x", "--workers=0"], ["--workers=0"]),
        (["folder", "{}/good"], ["--name", "--help"]),
        (["zip", "{}/good"], ["digits", "folder", "--help"]),
        ([], ["digits", "folder"]),
    ],
)
def test_mistakes_are_one_sentence_and_status_1(tmp_path, capsys, arguments, words):
    fill(tmp_path / "good", "1.jpg", "2.jpg")
    for name in ("texts/a.txt", "bad/1.jpg", "bad/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("nothing")
    (tmp_path / "taken/1.0.0").mkdir(parents=True)
    arguments = [argument.format(tmp_path) for argument in arguments]
    if arguments[:1] == ["folder"]:
        arguments.append(f"--data_dir={tmp_path}")
    assert prepare.main(arguments) == 1
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert all(word in captured.err for word in words), captured.err
    assert not list((tmp_path / "x").glob("*"))


def test_help_shows_an_example():
    for arguments in (["--help"], ["folder", "--help"], ["digits", "--help"]):
        command = [sys.executable, "-m", "beit_jax.prepare", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        assert "python -m beit_jax.prepare folder ~/imagenet --name=imagenet2012" in done.stdout
