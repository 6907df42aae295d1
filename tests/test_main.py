"""The command line: what a person types, and what a mistake is answered with."""

import contextlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from ml_collections import config_flags

from beit_jax import (
    checkpoint,
    command_line,
    features,
    frozen,
    main,
    metrics,
    predict,
    stored_config,
)
from beit_jax.errors import UserError

TINY = (
    "--config.model.width=32", "--config.model.depth=1", "--config.model.heads=2",
    "--config.dvae.width=8", "--config.dvae.vocabulary=16", "--config.dvae.decoder_input=8",
    "--config.train.batch_size=16", "--config.train.steps=2", "--config.eval.batch_size=64",
    "--config.data.workers=0", "--config.optimizer.warmup_epochs=0",
)  # fmt: skip


def command(*flags) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "beit_jax.main", *map(str, flags)],
        env=os.environ | tiny.on_devices(1),
        capture_output=True,
        text=True,
    )


def refusal(*flags) -> str:
    """The one sentence that a mistake is answered with."""
    done = command(*flags)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.smoke
def test_the_chain_of_three_commands(tmp_path):
    stages = {
        "dvae": ("--config=configs/digits_dvae.py",),
        "mim": (
            "--config=configs/digits_mim.py",
            f"--config.tokenizer.path={tmp_path}/dvae",
            "--config.optimizer.warmup_steps=1",
        ),
        "classify": (
            "--config=configs/digits_classify.py",
            f"--config.init.path={tmp_path}/mim",
            "--config.optimizer.warmup_steps=1",
            "--config.data.labels_per_class=2",
        ),
    }
    for name, given in stages.items():
        done = command(*given, *TINY, f"--workdir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert "compiling" in done.stdout
        lines = metrics.read(tmp_path / name)
        assert {line["split"] for line in lines} >= {"train", "validation", "timing"}
        assert (tmp_path / name / "checkpoints" / "2" / "params").is_dir()
    assert "encoder arrays taken" in done.stdout
    scores = next(line for line in metrics.read(tmp_path / "mim") if line["split"] == "validation")
    assert {"evidence_bound", "masked_patches", "knn", "probe", "pixel_knn"} <= scores.keys()
    assert scores["masked_patches"] == 10
    bound = -(scores["reconstruction_nats"] + scores["masked_token_nats"])
    assert scores["evidence_bound"] == pytest.approx(bound, rel=1e-5)
    assert list((tmp_path / "mim" / "pictures").glob("reconstruction_*.png"))

    # Only the run's folder is needed to evaluate.
    again = command("--mode=eval", f"--workdir={tmp_path / 'mim'}", "--config.eval.batch_size=96")
    assert again.returncode == 0, again.stderr
    both = [line for line in metrics.read(tmp_path / "mim") if line["split"] == "validation"]
    assert both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-5)

    other = (flag for flag in TINY if "model.width" not in flag)
    changed = refusal(*stages["mim"], *other, f"--workdir={tmp_path / 'mim'}",
                      "--config.model.width=64")  # fmt: skip
    assert "has changed since it was started, config.model.width from 32 to 64; " in changed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--config is missing"),
        (("--config=configs/nothing.py",), "configs/nothing.py"),
        (("--config=configs/finetune_base.py:v3",), "no preset 'v3'; choose one of v1, v1_22k,"),
        (("--config=configs/mim_base.py:v3",), "get_config() takes 0 positional arguments"),
        (("--config=configs/mim_base.py", "--config.model.widht=3"), "did you mean width?"),
        (("--config=configs/mim_base.py", "--config.model.width=wide"), "wide"),
        (("--config=configs/mim_base.py", "stray"), "stray"),
        (("--config=configs/mim_base.py", "--mode=sing"), "sing"),
        (("--config=configs/digits_mim.py", "--config.tokenizer.path="), "configs/dvae.py"),
        (("--config=configs/mim_base.py",), "folder:PATH"),
        (("--mode=eval", "--workdir=nowhere"), "nowhere"),
        (
            ("--mode=eval", "--config=configs/mim_base.py", "--workdir=gs://bucket/run"),
            "mount the bucket",
        ),
    ],
)
def test_mistakes_get_one_sentence(flags, said, tmp_path):
    workdir = () if "--mode=eval" in flags else (f"--workdir={tmp_path / 'run'}",)
    assert said in refusal(*flags, *(workdir if flags else ()))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--config.train.lables=4"], "no config.train.lables; configs/common.py has every key."),
        (["--noconfig.data.fliq"], "there is no config.data.fliq; did you mean flip?"),
        (["--config.trian.steps=4"], "there is no config.trian; did you mean train?"),
        (
            ["--config.eval.knn=(5,)", "--config.eval.knn=(9,)"],
            "config.eval.knn is given more than",
        ),
    ],
)
def test_a_key_that_is_not_there_or_there_twice(wrong, said, monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    argv = ["main", "--config=configs/mim_base.py", *wrong]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for its keys
    with pytest.raises(UserError, match=re.escape(said)):
        command_line.parse_flags(values, argv)


@pytest.mark.parametrize("content", [b"", b"null", b"\x80"])
def test_a_damaged_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is damaged .*; restore or delete it"):
        stored_config.read_config(tmp_path)


def test_force_goes_on_with_another_config_and_other_data(tmp_path, monkeypatch, capsys):
    tree = tiny.config("classify", train__steps=1)
    tiny.store_config(tmp_path, tree)
    (tmp_path / "data.json").write_text("{}")
    argv = ["main", f"--workdir={tmp_path}", "--config.optimizer.clip=7.0"]
    for force in ([], ["--force"]):
        monkeypatch.setattr(sys, "argv", argv + force)
        with flagsaver.flagsaver():
            main.parse(argv + force)
            with contextlib.nullcontext() if force else pytest.raises(UserError, match="--force"):
                main.resolve()
    assert "config.optimizer.clip from 3.0 to 7.0" in capsys.readouterr().out
    assert not (tmp_path / "data.json").exists()


def test_help_has_an_example():
    done = command("--help")
    assert done.returncode == 0
    assert "python -m beit_jax.main --config=configs/mim_base.py" in done.stdout


def test_config_json_is_the_resolved_config(tmp_path):
    tree = tiny.config("mim", model__width=48)
    tiny.store_config(tmp_path, tree)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 48


def older(folder, *keys):
    """Takes keys from a run's config.json, as if it were older than they are."""
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    for key in keys:
        section, name = key.split(".")
        del tree[section][name]
    path.write_text(json.dumps(tree))
    return folder


def test_a_run_older_than_a_key_is_read_with_its_default(tmp_path, monkeypatch):
    new = ("classify.erase", "eval.raw", "data.predict_split", "model.norm_pre")
    tree = tiny.config("classify", data__source="digits")
    folder = older(tiny.random_network(tmp_path / "run", tree, 10), *new)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"knn": []', '"knn": 0'))  # which was one number
    assert stored_config.read_config(folder) == tree.to_dict()
    answers = predict.load(folder)(np.zeros((1, 8, 8, 1), np.uint8))
    assert features.load(folder)(np.zeros((1, 8, 8, 1), np.uint8)).shape == (1, 32)
    assert len(answers[0]) == 5

    monkeypatch.setattr(stored_config, "COMMON", tmp_path / "not" / "here.py")
    for load in (predict.load, features.load):
        with pytest.raises(UserError, match="config.json is older than config.classify.erase: "):
            load(folder)
    older(tmp_path / "run", "classify.head_scale")  # which no limit is known for
    tree = json.loads((folder / "config.json").read_text())
    tree["classify"]["erase"] = 0.0
    (folder / "config.json").write_text(json.dumps(tree))
    assert "head_scale" not in stored_config.read_config(folder)["classify"]


def test_a_frozen_copy_older_than_a_key(tmp_path):
    run = tmp_path / "run"
    folder = tiny.random_network(tmp_path / "dvae", tiny.config("dvae"), 0)
    weights = checkpoint.load_weights(str(folder), "a test")
    lacking = {**weights.config, "model": {}}
    frozen.save(run / "frozen" / "tokenizer", weights._replace(config=lacking))
    found = frozen.load(run / "frozen" / "tokenizer")
    assert found.config["model"]["norm_pre"] is False and found.config["dvae"]["width"] == 8


def test_a_workdir_of_another_task(tmp_path):
    tiny.store_config(tmp_path, tiny.config("classify"))
    said = refusal("--config=configs/digits_mim.py", f"--workdir={tmp_path}")
    assert f"{tmp_path} is a run of task classify, and this config is of task mim" in said
