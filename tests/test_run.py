"""What a run refuses before it costs anything, and what it leaves alone."""

import os

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from beit_jax import checkpoint, frozen, metrics, reading
from beit_jax.errors import UserError
from configs import mim_base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.random_tokenizer(tmp_path_factory.mktemp("dvae"))


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "photos" / f"trip {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_the_papers_recipe_reads_a_folder(photos, tmp_path):
    """At its own size, up to the first batch; the README's commands are run small, in test_docs."""
    config = mim_base.get_config()
    config.data.source = f"folder:{photos}"
    config.data.workers = 0
    config.data.holdout = 0.3
    config.train.batch_size = 8
    config.optimizer.warmup_epochs = 0.0
    small = {"data__channels": 3, "dvae__groups": 4, "data__image_size": (16, 16)}
    config.tokenizer.path = str(tiny.random_tokenizer(tmp_path / "tokenizer", **small))
    run = tiny.run(config, tmp_path / "run")
    run._check_evaluation()
    batch = next(run.train_batches(0))
    assert {name: x.shape for name, x in batch.items()} == {
        "image": (8, 224, 224, 3), "label": (8,)
    }  # fmt: skip


def test_readers_are_one_a_core_unless_said_otherwise(monkeypatch):
    for cores, asked, wanted in [(3, -1, 3), (64, -1, 16), (3, 0, 0), (3, 5, 5)]:
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False
        )
        assert reading.workers(tiny.config("mim", data__workers=asked)) == wanted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__eval_split": "validaton"}, "validaton"),
        ({"eval__select_split": "nowhere", "eval__knn": (3,)}, "nowhere"),
        ({"eval__best": "acuracy"}, "config.eval.best='acuracy'.*accuracy"),
        ({"train__batch_size": 12}, "12 is not divisible by 8 devices; try 8 or 16"),
    ],
)
def test_evaluation_is_checked_before_training(changes, said, tokenizer, tmp_path):
    tree = tiny.config("mim", tokenizer__path=str(tokenizer), **changes)
    with pytest.raises(UserError, match=said):
        tiny.run(tree, tmp_path / "run").execute("train")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.checkpoint_every", 0), ("train.log_every", 0), ("data.channels", 0),
        ("seed", -1), ("seed", 2**32),
        ("data.image_size", (0, 8)), ("data.image_size", (8, 8, 1)), ("data.eval_crop", 0.0),
        ("data.crop_ratio", (0.0, 1.0)), ("data.crop_ratio", (1.0,)), ("segment.resize", (1.0,)),
        ("segment.resize", (2.0, 0.5)), ("segment.pools", (1, 0)), ("segment.auxiliary_width", -1),
        ("data.crop_scale", (2.0, 3.0)), ("model.depth", 0),
        ("model.dtype", "float99"), ("data.workers", -2), ("data.labels_per_class", -1),
        ("train.ema_decay", 2.0), ("train.max_skipped", 0), ("mesh.fsdp", 3),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_key(key, value, tmp_path):
    tree = tiny.config("dvae")
    tree.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key}="):
        tiny.run(tree, tmp_path)


def test_evaluating_a_run_that_trains_elsewhere_disturbs_nothing(tokenizer, tmp_path):
    tree = tiny.config("mim", tokenizer__path=str(tokenizer), train__steps=2)
    one = jax.devices()[:1]
    tiny.run(tree, tmp_path, one).execute("train")
    with open(tmp_path / "metrics.jsonl", "a") as lines:  # the trainer is further already
        lines.write('{"step": 9, "split": "train", "loss": 0.0}\n')
    saving = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    saving.mkdir()
    before = (tmp_path / "config.json").read_text()
    tiny.run(tree, tmp_path, one).execute("eval")
    assert 9 in [line["step"] for line in metrics.read(tmp_path)]
    assert saving.is_dir()
    assert (tmp_path / "config.json").read_text() == before


def test_another_tokenizer_is_refused_and_a_lost_one_not_needed(tokenizer, tmp_path):
    tree = tiny.config("mim", tokenizer__path=str(tokenizer))
    first = tiny.run(tree, tmp_path / "run")
    assert not (tmp_path / "run" / "frozen").exists()  # an evaluation leaves the run as it is
    frozen.keep(first.folder, first.task.copies)  # as training does
    other = tiny.random_tokenizer(tmp_path / "other", seed=1)
    tree.tokenizer.path = str(other)
    with pytest.raises(UserError, match="names another; give a new --workdir"):
        tiny.run(tree, tmp_path / "run")
    tree.tokenizer.path = str(tmp_path / "deleted")
    kept = tiny.run(tree, tmp_path / "run").task.frozen
    expected = checkpoint.load_weights(str(tokenizer), "config.tokenizer.path").digest
    assert checkpoint.digest(jax.device_get(kept)) == expected  # of all collections


def test_a_few_label_run_is_evaluated_where_a_class_has_fewer(tmp_path):
    run = tiny.run(tiny.config("classify", data__labels_per_class=500), tmp_path / "run")
    assert next(run.split_batches("validation"))["valid"].all()
    with pytest.raises(UserError, match="labels_per_class is 500, but class '0' has only"):
        run.execute("train")
    assert not (tmp_path / "run").exists()


def test_images_without_a_label_weigh_nothing(tmp_path):
    run = tiny.run(tiny.config("classify"), tmp_path)
    params, _ = run.task.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 1), np.uint8)
    labels = np.array([3, -1, 5, -1], np.int32)

    def loss(images, labels):
        batch = {"image": images, "label": labels}
        (total, weight), _ = run.task.loss_fn(
            params, {}, {}, batch, jax.random.split(jax.random.key(0), len(labels)), 0
        )
        return float(total / weight)

    np.testing.assert_allclose(loss(images, labels), loss(images[::2], labels[::2]), rtol=1e-6)


def test_a_workdir_that_cannot_be_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    tree = tiny.config("dvae")
    with pytest.raises(UserError, match="cannot be written"):
        tiny.run(tree, tmp_path / "file").execute("train")
