"""Where images come from: splits, labels, TFDS on disk, and what a person is told when it fails."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest

from beit_jax.data import folder
from beit_jax.data.collection import Collection, RecordLayout, records_part
from beit_jax.data.digits import digits
from beit_jax.data.record import Record
from beit_jax.data.sources import FewLabels, open_source
from beit_jax.data.tfds_store import find_dataset
from beit_jax.data.tfds_writer import write_dataset
from beit_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def names(source) -> list[str]:
    return [source[i].name for i in range(len(source))]


def test_folder_without_split_folders_is_divided_by_path(tmp_path):
    root = touch(tmp_path, *(f"class_{i % 3}/deep/{i}.JPEG" for i in range(300)), "class_1/x.txt")
    train = open_source(f"folder:{root}", "train", holdout=0.2)
    held = open_source(f"folder:{root}", "validation", holdout=0.2)
    assert len(train) + len(held) == 300 and not set(names(train)) & set(names(held))
    assert 35 < len(held) < 85
    assert train.class_names == held.class_names == ("class_0", "class_1", "class_2")
    for source in (train, held):
        assert names(source) == sorted(names(source))
        for i in range(0, len(source), 7):
            record = source[i]
            assert record.name.startswith(source.class_names[record.label] + "/")
            assert record.image == record.name.encode() and source.labels()[i] == record.label
    # An image keeps its split when others come, and the folder's own place does not matter.
    touch(root, *(f"class_0/new_{i}.png" for i in range(100)))
    after = open_source(f"folder:{root}", "validation", holdout=0.2)
    assert set(names(held)) == {n for n in names(after) if "new_" not in n}
    assert after.fingerprint != held.fingerprint


def test_holdout_is_the_same_on_every_machine():
    _, held = folder.hold_out([f"{i}.png" for i in range(40)], 0.1)
    assert held == ["25.png"]


def test_holdout_is_never_empty_nor_everything():
    assert [len(part) for part in folder.hold_out(["a", "b"], 1e-9)] == [1, 1]
    assert [len(part) for part in folder.hold_out(["a", "b", "c"], 0.999999)] == [1, 2]
    assert folder.hold_out(["a", "b"], 0.0) == (["a", "b"], [])
    with pytest.raises(UserError, match="config.data.holdout is 1.5"):
        folder.hold_out(["a"], 1.5)


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_split_folders_and_one_numbering_of_classes(tmp_path, validation):
    root = touch(tmp_path, "train/a/1.png", "train/b/2.png", "test/5.png")
    touch(root / validation, "b/3.png", "c/4.png")
    train, held, test = (
        open_source(f"folder:{root}", split) for split in ("train", "validation", "test")
    )
    assert names(train) == ["train/a/1.png", "train/b/2.png"]
    assert names(held) == [f"{validation}/b/3.png", f"{validation}/c/4.png"]
    assert train.class_names == held.class_names == ("a", "b", "c")
    assert list(train.labels()) == [0, 1] and list(held.labels()) == [1, 2]
    assert list(test.labels()) == [-1]


def test_train_and_test_without_validation_hold_out_of_train(tmp_path):
    root = touch(tmp_path, *(f"train/{i}.png" for i in range(50)), "test/0.png")
    train = open_source(f"folder:{root}", "train", holdout=0.2)
    held = open_source(f"folder:{root}", "validation", holdout=0.2)
    assert len(train) + len(held) == 50 and len(held) > 0
    assert names(open_source(f"folder:{root}", "test")) == ["test/0.png"]
    assert train.class_names == ()


def test_a_class_called_train_is_no_split(tmp_path):
    root = touch(tmp_path, *(f"{kind}/{i}.png" for kind in ("car", "train") for i in range(9)))
    assert open_source(f"folder:{root}", "train").class_names == ("car", "train")


def test_flat_folder_has_no_labels_and_hidden_files_are_no_images(tmp_path):
    root = touch(
        tmp_path, "1.png", "2.TIF", ".hidden.png", "._1.png", ".git/3.png", "__MACOSX/4.png"
    )
    source = open_source(f"folder:{root}", "train", holdout=0.0)
    assert names(source) == ["1.png", "2.TIF"]
    assert source.class_names == () and source[0].label == -1


def test_links_are_followed_and_circles_end(tmp_path):
    touch(tmp_path / "far", "x/1.png")
    root = touch(tmp_path / "root", "a/2.png")
    (root / "b").symlink_to(tmp_path / "far")
    (root / "a" / "up").symlink_to(root)
    assert folder.list_images(root) == ["a/2.png", "b/x/1.png"]


@pytest.mark.parametrize(
    "source, split, words",
    [
        ("folder:{}/nowhere", "train", ["there is no folder", "nowhere"]),
        ("folder:{}/empty", "train", ["no image below", "no file at all"]),
        ("folder:{}/texts", "train", ["no image below", ".txt (2)", ".heic (1)", ".jpg"]),
        ("folder:{}/images", "train[5%:]", ["slice", "config.data.holdout"]),
        ("folder:{}/images", "test", ["no split 'test'", "train, validation"]),
        ("folder:", "train", ["config.data.source is 'folder:'", "folder:PATH"]),
        ("imagenet", "train", ["config.data.source is 'imagenet'", "tfds:NAME"]),
        ("tfds:imagenet2012", "train", ["beit_jax.prepare folder", "--name=imagenet2012",
                                        "train/", "val/", "config.data.source=folder:PATH"]),
        ("tfds:cifar10", "train", ["beit_jax.prepare folder", "--name=cifar10", "tfds build",
                                   "folder:PATH"]),
        ("tfds:../../etc", "train", ["no TFDS name"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_sentence(tmp_path, source, split, words):
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "texts", "a.txt", "b/c.txt", "d.HEIC")
    touch(tmp_path / "images", *(f"{i}.png" for i in range(30)))
    with pytest.raises(UserError) as error:
        open_source(source.format(tmp_path), split, data_dir=str(tmp_path / "tfds"))
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")
    if source.startswith("tfds:c") or "imagenet2012" in source:
        assert f"--data_dir={tmp_path}/tfds" in message


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("tfds"))
    open_source("digits", "train", data_dir=path)
    return path


def test_digits_are_complete_disjoint_and_stratified(digits_dir):
    from sklearn.datasets import load_digits

    splits = {s: open_source("digits", s, data_dir=digits_dir) for s in digits()}
    assert {s: len(source) for s, source in splits.items()} == {
        "train": 1097, "validation": 350, "test": 350,
    }  # fmt: skip
    everything = [name for source in splits.values() for name in names(source)]
    assert len(set(everything)) == len(everything) == 1797
    bunch = load_digits()
    for source in splits.values():
        assert source.class_names == tuple("0123456789")
        counts = np.bincount(source.labels()) / len(source)
        assert np.abs(counts - np.bincount(bunch.target) / 1797).max() < 0.005
        for i in (0, 100, len(source) - 1):
            record = source[i]
            number = int(record.name.removeprefix("digit_").removesuffix(".png"))
            pixels = cv2.imdecode(np.frombuffer(record.image, np.uint8), -1)
            assert record.label == bunch.target[number] == source.labels()[i]
            np.testing.assert_array_equal(np.round(pixels * (16 / 255)), bunch.images[number])


def test_tfds_slices_and_their_mistakes(digits_dir):
    whole = open_source("tfds:digits:1.0.0", "train", data_dir=digits_dir)
    tail = open_source("tfds:digits", "train[99%:]", data_dir=digits_dir)
    assert names(tail) == names(whole)[-len(tail) :] and len(tail) == 11
    assert tail.fingerprint != whole.fingerprint
    with pytest.raises(UserError, match="no split 'training': it has train, validation, test"):
        open_source("digits", "training", data_dir=digits_dir)
    with pytest.raises(UserError, match="no split 'train.9x:.'"):
        open_source("digits", "train[9x:]", data_dir=digits_dir)
    with pytest.raises(UserError, match="empty"):
        open_source("digits", "train[:0]", data_dir=digits_dir)
    with pytest.raises(UserError, match="version 1.0.0 is"):
        open_source("tfds:digits:2.0.0", "train", data_dir=digits_dir)


def write(name: str, data_dir: str, records, class_names=()) -> Path:
    """Writes records as the split train; returns the data set's folder."""
    layout = RecordLayout(bool(class_names), class_names, channels=None)
    collection = Collection({"train": [records_part(name, records, layout)]}, layout)
    return write_dataset(name, data_dir, collection).folder


def test_several_configs_and_versions(tmp_path):
    record = Record(np.zeros((2, 2), np.uint8), -1, "x")
    made = write("pets", str(tmp_path), [record])
    for place in ("small/1.2.0", "small/1.10.0", "large/1.0.0"):
        (tmp_path / "pets" / place).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", made, tmp_path / "pets" / place], check=True)
    subprocess.run(["rm", "-r", made], check=True)
    with pytest.raises(UserError, match="tfds:pets/large, tfds:pets/small"):
        open_source("tfds:pets", "train", data_dir=str(tmp_path))
    assert find_dataset("pets/small", str(tmp_path)).name == "1.10.0"
    assert find_dataset("pets/small:1.2.0", str(tmp_path)).name == "1.2.0"
    assert len(open_source("tfds:pets/large", "train", data_dir=str(tmp_path))) == 1


def test_tfrecord_is_refused_with_the_way_out(tmp_path):
    record = Record(np.zeros((2, 2), np.uint8), -1, "x")
    made = write("old", str(tmp_path), [record])
    info = json.loads((made / "dataset_info.json").read_text())
    (made / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="stored as tfrecord .* beit_jax.prepare tfrecord .*old"):
        open_source("tfds:old", "train", data_dir=str(tmp_path))


def test_bytes_and_odd_names_survive_tfds(tmp_path):
    odd = b"\xff/\xc3\xa9 x.jpg".decode(errors="surrogateescape")
    png = cv2.imencode(".png", np.eye(2, dtype=np.uint8))[1].tobytes()
    images = [png + b"anything \x00\xff", png]
    records = [Record(data, i - 1, odd) for i, data in enumerate(images)]
    write("odd", str(tmp_path), records, class_names=("a", "b"))
    source = open_source("tfds:odd", "train", data_dir=str(tmp_path))
    assert [source[i] for i in range(2)] == records
    assert list(source.labels()) == [-1, 0]


def test_first_writer_wins_and_unfinished_data_is_invisible(tmp_path):
    one, two = (Record(np.full((2, 2, 1), i, np.uint8), -1, f"{i}.png") for i in (1, 2))

    def slow_writer():
        yield two
        # Another process finishes the same data set while this one writes; this one is invisible.
        with pytest.raises(UserError, match="not prepared"):
            open_source("tfds:race", "train", data_dir=str(tmp_path))
        write("race", str(tmp_path), [one])

    write("race", str(tmp_path), slow_writer())
    assert open_source("tfds:race", "train", data_dir=str(tmp_path))[0].name == one.name
    assert [path.name for path in (tmp_path / "race").iterdir()] == ["1.0.0"]


def test_a_failing_writer_leaves_nothing(tmp_path):
    def failing():
        yield Record(np.zeros((2, 2), np.uint8), -1, "x")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write("half", str(tmp_path), failing())
    assert not any((tmp_path / "half").iterdir())


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    touch(tmp_path, "file")
    with pytest.raises(UserError, match="cannot be written .* config.data.data_dir"):
        open_source("digits", "train", data_dir=str(tmp_path / "file"))


def test_several_processes_write_the_digits_at_once(tmp_path):
    code = f"""
        from beit_jax.data.sources import open_source
        print(len(open_source("digits", "validation", data_dir={str(tmp_path)!r})))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == [b"350", b"350"]
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_neither_tensorflow_nor_the_network_is_needed(tmp_path):
    """A package called tensorflow that cannot be imported, and sockets that cannot be opened."""
    touch(tmp_path, "fake/tensorflow/__init__.py")
    (tmp_path / "fake/tensorflow/__init__.py").write_text("raise SystemExit('tensorflow imported')")
    code = f"""
        import socket, sys
        def refuse(*args, **kwargs):
            raise SystemExit("the network was asked")
        socket.socket.connect = socket.getaddrinfo = refuse
        from beit_jax.data.sources import open_source
        from beit_jax.errors import UserError
        source = open_source("digits", "test[:10]", data_dir={str(tmp_path)!r})
        assert source[3].label in range(10) and len(source.labels()) == 10
        for name in ("imagenet2012", "mnist", "not_a_dataset"):
            try:
                open_source("tfds:" + name, "train", data_dir={str(tmp_path)!r})
            except UserError:
                pass
        assert not any(m == "tensorflow" or m.startswith("tensorflow.") for m in sys.modules)
        print("fine")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}/fake", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_few_labels_are_balanced_seeded_and_nested(digits_dir):
    source = open_source("digits", "train", data_dir=digits_dir)
    five, ten = FewLabels(source, 5, 0), FewLabels(source, 10, 0)
    assert len(five) == 50 and (np.bincount(five.labels()) == 5).all()
    assert [five[i].label for i in range(50)] == list(five.labels())
    assert set(names(five)) < set(names(ten)) < set(names(source))
    assert set(names(five)) != set(names(FewLabels(source, 5, 1)))
    assert names(five) == names(FewLabels(source, 5, 0))
    with pytest.raises(UserError, match="labels_per_class is 500, but class '0' has only"):
        FewLabels(source, 500, 0).labels()


def test_one_image_leaves_nothing_to_hold_out(tmp_path):
    source = f"folder:{touch(tmp_path, '1.png')}"
    with pytest.raises(UserError, match="has one image, .* config.data.eval_split=train"):
        open_source(source, "validation")
    with pytest.raises(UserError, match="has no split 'test'"):
        open_source(source, "test")


def test_few_labels_need_labels(tmp_path):
    source = open_source(f"folder:{touch(tmp_path, '1.png')}", "train")
    with pytest.raises(UserError, match="sub-folder per class"):
        FewLabels(source, 1, 0)
