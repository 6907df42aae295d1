"""The report says what the runs' files say."""

import json
import os

import pytest

from beit_jax.report import tables
from beit_jax.report.__main__ import main
from beit_jax.report.page import page
from beit_jax.report.runs import read_run


def write_run(folder, task, lines, **config):
    folder.mkdir()
    tree = {"task": task, "init": {"path": ""}, "data": {"labels_per_class": 0}}
    for key, value in config.items():
        section, name = key.split("__")
        tree[section][name] = value
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(
            tmp_path / "dvae",
            "dvae",
            [
                {"step": 9, "split": "validation", "reconstruction": -2.5, "usage": 0.75},
                {"step": 9, "split": "timing", "train_seconds": 61.4},
            ],
        ),
        write_run(
            tmp_path / "mim",
            "mim",
            [
                {"step": 9, "split": "validation", "loss": 9.0},
                {
                    "step": 9,
                    "split": "test",
                    **{"loss": 2.0, "accuracy": 0.25, "guess_accuracy": 0.1},
                    **{"knn": 0.9, "knn_block": 2.0, "knn_from_cls": 0.0, "pixel_knn": 0.98},
                    "probe": None,
                },
            ],
        ),
        *(
            write_run(
                tmp_path / name,
                "classify",
                [{"step": 3, "split": "test", "accuracy": accuracy, "loss": 1.0}],
                init__path=start,
                data__labels_per_class=5,
            )
            for name, start, accuracy in (
                ("scratch", "", 0.5), ("one", "runs/mim", 0.6), ("two", "runs/mim", 0.8),
            )
        ),
    ]  # fmt: skip


def test_tables(runs):
    stages, features, labels = tables.make_tables([read_run(run) for run in runs])
    assert stages.rows[0][2:5] == ("9", "61 s", "validation")
    assert "codes used 75%" in stages.rows[0][5]
    assert "loss 2.000, masked-token accuracy 25.0%" in stages.rows[1][5]
    assert features.rows == [
        ("encoder, pre-trained (mim)", "90.0% (block 3, mean)", "-"),
        ("raw pixels", "98.0%", "-"),
    ]
    assert labels.rows == [("5", "50.0%", "70.0% ± 14.1 (2 runs)")]
    assert tables.verdicts([read_run(runs[0])]).rows[0] == (
        "dvae",
        "too early to say",
        "no update was made",
        "",
    )


def test_runs_of_one_name_are_averaged(runs, tmp_path):
    again = [read_run(run) for run in runs if run.endswith("mim")]
    other = again[0]._replace(lines=[{**again[0].lines[-1], "knn": 0.8}])
    table = tables.features([*again, other])
    assert table.rows[0] == ("encoder, pre-trained (mim)", "85.0% ± 7.1 (2 runs)", "-")
    assert table.rows[1:] == [("raw pixels", "98.0%", "-")]


def test_the_newest_picture_of_each_name_is_shown(runs, tmp_path):
    (tmp_path / "dvae" / "pictures").mkdir()
    for number, name in enumerate(("reconstruction_5", "reconstruction_9", "codes_9")):
        picture = tmp_path / "dvae" / "pictures" / f"{name}.png"
        picture.write_bytes(name.encode())
        os.utime(picture, (number, number))
    run = read_run(runs[0])
    assert {name: path.stem for name, path in run.pictures.items()} == {
        "reconstruction": "reconstruction_9", "codes": "codes_9"
    }  # fmt: skip
    text = page([run], [])
    assert text.count("<img") == 2 and "by way of its tokens" in text


def test_the_command_writes_one_page(runs, tmp_path, capsys):
    written = tmp_path / "report.html"
    assert main([*runs, f"--output={written}"]) == 0
    assert "from pre-training" in capsys.readouterr().out
    text = written.read_text()
    assert "70.0% ± 14.1" in text and "<img" not in text


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "is no run" in capsys.readouterr().err
