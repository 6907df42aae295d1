"""From images to class names: in Python, and from a folder to a table."""

import csv
import json
import os
import shutil
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
import tiny
from golden_files import GOLDEN

from beit_jax import checkpoint, class_names, convert, predict
from beit_jax.architecture import make_classifier
from beit_jax.data import sources
from beit_jax.errors import UserError

NAMES = tuple("zero one two three four five six seven eight nine".split())
RANDOM = np.random.default_rng(0)


def classifier(folder, classes=10, **changes):
    """A classifier with random weights in the folder of a run."""
    tree = tiny.config("classify", eval__batch_size=8, **changes)
    tiny.random_network(folder, tree, classes)
    class_names.keep(folder, NAMES[:classes])
    return tree


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, classifier(folder, mesh__fsdp=4)  # on more devices than some tests have


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """{name: pixels} of images of all sizes in a folder of folders, among what is none."""
    root = tmp_path_factory.mktemp("photos")
    names = [f"{i}.png" for i in range(16)] + ['trip, to "Rome"/a.png', "trip/\udcff.png"]
    found = {}
    for i, name in enumerate(names):
        pixels = RANDOM.integers(0, 256, (8 + i % 5, 9 + i % 3, 1), np.uint8)
        (root / name).parent.mkdir(exist_ok=True)
        with open(os.path.join(root, name), "wb") as file:
            file.write(cv2.imencode(".png", pixels)[1].tobytes())
        found[name] = pixels
    (root / "10b.png").write_bytes(b"broken")
    (root / "trip" / "notes.txt").write_text("no image")
    return root, found


def table(folder) -> list[dict]:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_is_answered_once_in_order_on_eight_devices(trained, photos):
    """18 images and a broken one, in batches of 8 on 8 devices, are the answers of Python's one."""
    (folder, tree), (root, pixels) = trained, photos
    tree.data.source = f"folder:{root}"
    predict.write(tree, folder)
    rows, names = table(folder), sorted(pixels)
    shown = [name.encode(errors="backslashreplace").decode() for name in names]
    assert [row["file"] for row in rows] == shown
    assert "10b.png" in (folder / "bad_files.txt").read_text()
    answers = predict.load(str(folder))([pixels[name] for name in names])
    for row, answer in zip(rows, answers, strict=True):
        assert [row[f"class_{rank}"] for rank in range(1, 6)] == [name for name, _ in answer]
        found = [float(row[f"probability_{rank}"]) for rank in range(1, 6)]
        np.testing.assert_allclose(found, [p for _, p in answer], atol=2e-6)
        assert found == sorted(found, reverse=True) and 0.4 < sum(found) <= 1
    assert len({row["probability_1"] for row in rows}) == len(rows)  # no row is another's


def test_answers_are_the_networks_own_probabilities_by_name(trained):
    """At the run's own size; the normalisation is the checkpoint's."""
    folder, tree = trained
    images = RANDOM.integers(0, 256, (3, 8, 8, 1), np.uint8)
    classify = predict.load(folder)
    weights = checkpoint.load_weights(str(folder), "test")
    logits = make_classifier(tree, 10).apply(weights.variables, (images / 255.0 - 0.5) / 0.5)
    for answer, expected in zip(classify(images), jax.nn.softmax(logits), strict=True):
        order = np.argsort(-np.asarray(expected))[:5]
        assert [name for name, _ in answer] == [NAMES[i] for i in order]
        np.testing.assert_allclose([p for _, p in answer], expected[order], atol=1e-5)
    assert classify([]) == []
    for wrong in (images / 255.0, images[..., [0, 0, 0]], images[0], np.zeros((1, 0, 8, 1), "u1")):
        with pytest.raises(UserError, match=r"the network reads uint8 \[H, W, 1\]"):
            classify(wrong)


def test_few_classes_and_classes_without_names(tmp_path):
    classifier(tmp_path, classes=3)
    images = RANDOM.integers(0, 256, (1, 8, 8, 1), np.uint8)
    (named,) = predict.load(tmp_path)(images)
    assert sorted(name for name, _ in named) == sorted(NAMES[:3])
    (tmp_path / "classes.txt").unlink()
    (numbered,) = predict.load(tmp_path)(images)
    assert [(NAMES[int(number)], p) for number, p in numbered] == named
    class_names.keep(tmp_path, NAMES)
    with pytest.raises(UserError, match="classes.txt names 10 classes, but the network has 3;"):
        predict.load(tmp_path)


def test_the_command_and_what_it_refuses(trained, photos, tmp_path):
    """On one device, with a split of TFDS; a tokenizer answers nobody."""
    folder, _ = trained
    flags = (
        "--mode=predict", f"--workdir={folder}", "--config.data.predict_split=test[:5]",
        "--config.data.source=digits",
    )  # fmt: skip
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder}/predictions.csv: 5 of 5 images" in done.stdout
    assert [row["file"] for row in table(folder)] == [
        sources.open_source("digits", "test").name(i) for i in range(5)
    ]
    probe = tiny.random_network(tmp_path / "probe", tiny.config("mim", eval__knn=(5,)), 16)
    class_names.keep(probe, NAMES)
    about = (probe / "config.json").read_text()
    for task in ("mim", "probe"):
        (probe / "config.json").write_text(about.replace('"mim",', f'"{task}",'))
        with pytest.raises(UserError, match=f"of task {task}, whose predictions are for no person"):
            predict.load(probe)
    with pytest.raises(UserError, match="of task dvae, whose predictions are for no person"):
        predict.load(tiny.random_network(tmp_path / "dvae", tiny.config("dvae"), 0))
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        predict.load(tmp_path)


@pytest.mark.parametrize("way", ["folder", "full disk"])
def test_a_table_that_cannot_be_written(way, trained, photos, tmp_path):
    (folder, tree), (root, _) = trained, photos
    run, tree.data.source = tmp_path / "run", f"folder:{root}"
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("predictions*"))
    if way == "folder":
        (run / "predictions.csv").mkdir()
    else:
        (run / "predictions.csv.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written .*; make way and room for .*csv.$"):
        predict.write(tree, run)


def command(*flags) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": ""}
    line = [sys.executable, "-m", "beit_jax.main", *flags]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (NAMES, "has learnt 'zero' as class 0, but .* has '0' in its place: .*correct classes.txt"),
        (tuple("0123"), r"has learnt 4 classes \(0, 1, 2, ...\), but .* has 10 classes"),
        (tuple("9876543210"), "has learnt '9' as class 0, but tfds:digits.* has '0' in its place"),
    ],
)
def test_data_of_other_classes_is_refused(tmp_path, names, said):
    tree = tiny.config("classify")
    class_names.keep(tmp_path, names)
    with pytest.raises(UserError, match=said):
        tiny.run(tree, tmp_path)


def test_odd_names_stand_on_one_line_each_and_agree_with_themselves(tmp_path):
    names = ("two\nlines", "\udcff", "ä b")
    class_names.keep(tmp_path, names)
    assert class_names.read(tmp_path) == ("two lines", "\\udcff", "ä b")
    class_names.check(tmp_path, tiny.Images(3), names)
    assert class_names.read(tmp_path / "nowhere") == ()


def test_names_go_through_hugging_faces_files(tmp_path):
    """id2label to classes.txt and back; its placeholders are no names."""
    theirs = tmp_path / "theirs"
    shutil.copytree(GOLDEN / "hf_beit_classification", theirs)
    about = json.loads((theirs / "config.json").read_text())
    assert convert.main(["import", str(theirs), str(tmp_path / "unnamed")]) == 0
    assert not (tmp_path / "unnamed" / "classes.txt").exists()

    about["id2label"] = {str(number): name for number, name in enumerate(NAMES)}
    (theirs / "config.json").write_text(json.dumps(about))
    assert convert.main(["import", str(theirs), str(tmp_path / "ours")]) == 0
    assert class_names.read(tmp_path / "ours") == NAMES
    assert convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "b"), "--format=hf"]) == 0
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["id2label"] == about["id2label"] and written["label2id"]["nine"] == 9
