"""The command line: what a person types, and what a mistake is answered with."""

import json
import subprocess
import sys

import pytest
import tiny

from beit_jax import metrics

TINY = (
    "--config.model.width=32", "--config.model.depth=1", "--config.model.heads=2",
    "--config.dvae.width=8", "--config.dvae.vocabulary=16", "--config.dvae.decoder_input=8",
    "--config.train.batch_size=16", "--config.train.steps=2", "--config.eval.batch_size=64",
    "--config.data.workers=0", "--config.optimizer.warmup_epochs=0",
)  # fmt: skip


def command(*flags) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "beit_jax.main", *map(str, flags)], capture_output=True, text=True
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
    for name, flags in stages.items():
        done = command(*flags, *TINY, f"--workdir={tmp_path / name}")
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

    # Only the run's folder is needed to evaluate, on another number of devices too.
    again = command("--mode=eval", f"--workdir={tmp_path / 'mim'}", "--config.eval.batch_size=96")
    assert again.returncode == 0, again.stderr
    both = [line for line in metrics.read(tmp_path / "mim") if line["split"] == "validation"]
    assert both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-5)

    changed = refusal(*stages["mim"], *TINY, f"--workdir={tmp_path / 'mim'}",
                      "--config.model.width=64")  # fmt: skip
    assert "was started with config.model.width=32, now it is 64" in changed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--config is missing"),
        (("--config=configs/nothing.py",), "configs/nothing.py"),
        (("--config=configs/finetune_base.py:v3",), "no preset 'v3'; choose one of v1, v1_22k,"),
        (("--config=configs/mim_base.py:v3",), "get_config() takes 0 positional arguments"),
        (("--config=configs/mim_base.py", "--config.model.widht=3"), '"width"'),
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


def test_help_has_an_example():
    done = command("--help")
    assert done.returncode == 0
    assert "python -m beit_jax.main --config=configs/mim_base.py" in done.stdout


def test_config_json_is_the_resolved_config(tmp_path):
    tree = tiny.config("mim", model__width=48)
    tiny.store_config(tmp_path, tree)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 48
