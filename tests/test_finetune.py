"""Fine-tuning as a whole: published presets, another head at another size, averaged weights."""

import importlib
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
import tiny

from beit_jax import checkpoint, class_names, evaluate, metrics, tasks, train
from beit_jax.errors import UserError

# From the authors' pages: images of an update, peak rate, epochs of warm-up and in all, layer-wise
# decay, stochastic depth, weight decay, and whether images are mixed.
PUBLISHED = {
    "base": {
        "v1": (1024, 4e-3, 20, 100, 0.65, 0.1, 0.05, True),
        "v1_22k": (4096, 3e-3, 5, 90, 0.65, 0.2, 0.05, False),
        "v1_from_22k": (512, 2e-5, 5, 30, 0.85, 0.1, 1e-8, False),
        "v2": (1024, 5e-4, 20, 100, 0.6, 0.2, 0.05, True),
        "v2_300": (1024, 5e-4, 20, 100, 0.65, 0.1, 0.05, True),
        "v2_21k": (4096, 6e-4, 20, 90, 0.75, 0.1, 0.05, True),
        "v2_from_21k": (1024, 5e-5, 20, 30, 0.75, 0.1, 0.05, False),
    },
    "large": {
        "v1": (1024, 1e-3, 5, 50, 0.75, 0.2, 0.05, True),
        "v1_22k": (2048, 2e-3, 5, 90, 0.75, 0.2, 0.05, False),
        "v1_from_22k": (512, 2e-5, 5, 30, 0.9, 0.4, 1e-8, False),
        "v2": (1024, 2e-4, 5, 50, 0.8, 0.2, 0.05, True),
        "v2_300": (1024, 5e-4, 5, 50, 0.8, 0.2, 0.05, True),
        "v2_21k": (4096, 6e-4, 20, 90, 0.75, 0.2, 0.05, True),
        "v2_from_21k": (1024, 7e-5, 5, 20, 0.8, 0.25, 0.05, False),
    },
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_presets_are_the_published_recipes(size):
    recipe = importlib.import_module(f"configs.finetune_{size}")
    assert set(recipe.PRESETS) == set(PUBLISHED[size])
    for name, expected in PUBLISHED[size].items():
        config = recipe.get_config(name)
        chosen, mixes = config.optimizer, config.classify
        assert (mixes.mixup, mixes.cutmix) in ((0.8, 1.0), (0.0, 0.0))
        found = (
            config.train.batch_size, chosen.learning_rate, chosen.warmup_epochs,
            config.train.epochs, chosen.layer_decay, config.model.drop_path, chosen.weight_decay,
            mixes.mixup > 0,
        )  # fmt: skip
        assert found == expected, name
        assert config.model.mean[0] == (0.5 if "v1" in name else 0.485), name
        intermediate = name in ("v1_22k", "v2_21k")
        assert ("22k" in config.data.source) == intermediate, name
        from_it = name.split("_from_")
        assert len(from_it) == 1 or config.init.path.endswith("_".join(from_it)), name


def folder_of(root, classes, number=8):
    """A folder of noise with a sub-folder for each class."""
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(number):
            cv2.imwrite(str(root / name / f"{i}.png"), generator.integers(0, 256, (20, 20), "u1"))
    return root


def test_another_head_at_twice_the_size_through_the_command(tmp_path):
    """As from ImageNet-22k to ImageNet-1k at 384 pixels: the head is replaced, the rest kept."""
    first = tiny.config("classify", model__positions="relative", model__layer_scale=0.1)
    tiny.random_network(tmp_path / "first", first, 10)
    photos = folder_of(tmp_path / "photos", ("cat", "dog", "owl"))
    done = subprocess.run(
        [
            sys.executable, "-m", "beit_jax.main", "--config=configs/finetune_base.py:v2_from_21k",
            f"--workdir={tmp_path / 'second'}", f"--config.init.path={tmp_path / 'first'}",
            f"--config.data.source=folder:{photos}", "--config.data.image_size=(16, 16)",
            "--config.data.eval_crop=1.0", "--config.data.channels=1", "--config.data.workers=0",
            "--config.model.mean=(0.5,)", "--config.model.std=(0.5,)", "--config.model.width=32",
            "--config.model.depth=2", "--config.model.heads=2", "--config.model.patch_size=2",
            "--config.train.batch_size=8", "--config.train.steps=2", "--config.train.log_every=1",
            "--config.train.ema_decay=0.9", "--config.optimizer.warmup_epochs=0",
            "--config.eval.batch_size=16",
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "taken too: fc_norm" in done.stdout
    assert "fresh: head, as its head/bias is (10,), here (3,)" in done.stdout
    assert "resized from 4x4 to 8x8 patches: encoder/block_*/attn/" in done.stdout
    assert "WARNING" not in done.stdout
    assert class_names.read(tmp_path / "second") == ("cat", "dog", "owl")
    scores = [line for line in metrics.read(tmp_path / "second") if line["split"] == "validation"]
    assert {"accuracy", "loss", "raw_accuracy", "raw_loss"} <= scores[-1].keys()
    assert "top5_accuracy" not in scores[-1]  # of three classes


def test_averaged_and_raw_weights_are_evaluated_by_name(tmp_path):
    tree = tiny.config(
        "classify", train__ema_decay=0.9, eval__raw=True, eval__best="raw_accuracy", train__steps=3
    )
    run = tiny.run(tree, tmp_path, jax.devices()[:1])
    run.execute("train")
    scores = next(line for line in metrics.read(tmp_path) if line["split"] == "validation")
    eval_step = evaluate.make_eval_step(run.task, tree.seed)
    for item, prefix in (("params", "raw_"), ("ema_params", "")):
        params = checkpoint.read_tree(tmp_path / "checkpoints" / "3" / item)
        weights = train.Weights(params, {}, {})
        found = evaluate.evaluate(run.task, eval_step, weights, run.split_batches("validation"))
        assert set(found) == {"loss", "accuracy", "top5_accuracy"}
        for name, value in found.items():
            assert scores[f"{prefix}{name}"] == pytest.approx(float(value), rel=1e-5)
    assert scores["raw_loss"] != pytest.approx(scores["loss"], rel=1e-4)
    assert class_names.read(tmp_path) == tuple("0123456789")

    # Nobody asked, or nothing is averaged: there is but one set of scores.
    for changes in ({"eval__raw": False}, {"train__ema_decay": 0.0}):
        tree = tiny.config("classify", **{"train__ema_decay": 0.9, "eval__raw": True, **changes})
        tree.eval.best = "raw_accuracy"
        with pytest.raises(UserError, match="config.eval.best='raw_accuracy' is not among"):
            tiny.run(tree, tmp_path / "other").execute("train")


def test_every_image_counts_once_on_any_devices_at_any_batch(tmp_path):
    tree = tiny.config("classify", data__eval_crop=0.875)
    tiny.random_network(tmp_path, tree, 10)
    for devices, size in ((1, 350), (8, 24)):
        tree.eval.batch_size = size
        tiny.run(tree, tmp_path, jax.devices()[:devices]).execute("eval")
    one, many = (line for line in metrics.read(tmp_path) if line["split"] == "validation")
    for name in ("loss", "accuracy", "top5_accuracy"):
        assert one[name] == pytest.approx(many[name], rel=1e-6)
    for name in ("accuracy", "top5_accuracy"):  # whole images of 350
        assert one[name] * 350 == pytest.approx(round(one[name] * 350), abs=1e-3)
    assert 0 < one["accuracy"] < one["top5_accuracy"] < 1


def test_what_an_imported_classifier_cannot_be_evaluated_on(tmp_path):
    """Without class names only their number can disagree, which the head's shape shows."""
    tree = tiny.config("classify")
    tiny.random_network(tmp_path / "run", tree, 10)
    tree.data.source = f"folder:{folder_of(tmp_path / 'photos', ('cat', 'dog'), 3)}"
    with pytest.raises(UserError, match=r"head/\w+ is \(.*10.?\) .* but \(.*2.?\) in the network"):
        tiny.run(tree, tmp_path / "run").execute("eval")
    tree.data.source = f"folder:{tmp_path / 'photos' / 'cat'}"
    with pytest.raises(UserError, match="has the one class 'photos', and task classify needs two"):
        tasks.build(tree, tiny.Images(4, ("photos",)), tmp_path)
    with pytest.raises(UserError, match="has no labels"):
        tiny.run(tree, tmp_path / "run")
