"""What masked image modelling predicts: codes or pixels, of the masked patches or of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from sklearn.datasets import load_sample_image

from beit_jax import tasks
from beit_jax.augment import normalize
from beit_jax.data import geometry
from beit_jax.data.geometry import View
from beit_jax.errors import UserError
from beit_jax.task import row_keys
from beit_jax.tasks.targets import Pixels, Tokens
from beit_jax.tokenizer import Tokenizer

RANDOM = np.random.default_rng(0)
BATCH = {"image": RANDOM.integers(0, 256, (4, 8, 8, 1), np.uint8)}
KEYS = row_keys(0, 0, jnp.arange(4))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tree = tiny.config("dvae", data__interpolation="lanczos")
    return tiny.random_network(tmp_path_factory.mktemp("dvae"), tree, 0)


def build(folder, **changes):
    """The task, and its parameters with random weights."""
    task = tasks.build(tiny.config("mim", **changes), tiny.Images(64), folder)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    random = np.random.default_rng(1)
    return task, jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def values(task, params, *, training: bool):
    """What an update or an evaluation of `BATCH` says."""
    batch = {name: BATCH[name] for name in task.views}

    @jax.jit
    def run(params, frozen):
        if training:
            _, (_, sums) = task.loss_fn(params, {}, frozen, batch, KEYS, 0)
        else:
            sums = task.eval_fn(params, {}, frozen, batch, KEYS)
        return task.finalize(sums)

    return {name: float(x) for name, x in run(params, task.frozen).items()}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("factor", [8, 13, 16])
def test_the_device_makes_the_tokenizers_view_as_pillow_does(interpolation, factor):
    target = tokens(interpolation, factor)
    assert not target.views
    images = load_sample_image("flower.jpg")[:224, :448][None]
    found = jax.jit(target.look)({"image": images / np.float32(255)})[0]
    view = View((14 * factor, 28 * factor), interpolation)
    wanted = geometry.resize(images[0], view).astype(np.float32)
    # Pillow cuts and rounds to whole numbers after each axis, we cut after both.
    assert np.sqrt(np.square(255 * found - wanted).mean()) < 0.6
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize(("interpolation", "factor"), [("lanczos", 17), ("box", 8), ("nearest", 8)])
def test_the_host_makes_a_tokenizers_view_of_more_pixels_or_of_other_kernels(interpolation, factor):
    target = tokens(interpolation, factor)
    view = View((14 * factor, 28 * factor), interpolation)
    assert target.views == {"token_image": view}
    shown = jnp.zeros((2, *view.size, 3))
    assert target.look({"image": jnp.zeros((2, 224, 448, 3)), "token_image": shown}) is shown


def tokens(interpolation, factor):
    """The codes of a tokenizer that was trained so, for patches of 16 pixels."""
    parts = dict.fromkeys(Tokenizer._fields) | {"interpolation": interpolation, "factor": factor}
    return Tokens(Tokenizer(**parts), (14, 28), (224, 448))


def test_the_tokenizers_view_is_resized_as_it_was_trained(tokenizer, tmp_path):
    task, _ = build(tmp_path, tokenizer__path=str(tokenizer))
    assert task.loss_fn.__self__.target.view.interpolation == "lanczos"
    assert task.views == {"image": View((8, 8), "bicubic")}


def test_all_patches_count_in_training_and_the_masked_ones_in_evaluation(tokenizer, tmp_path):
    masked, params = build(tmp_path, tokenizer__path=str(tokenizer))
    every, _ = build(tmp_path, tokenizer__path=str(tokenizer), mim__predict="all")
    one, other = (values(task, params, training=False) for task in (masked, every))
    assert one == other and one["masked_patches"] == 10
    parts = every.loss_fn.__self__
    # By hand: every patch is read, and the same patches are hidden from the encoder.
    images = normalize(BATCH["image"] / np.float32(255), (0.5,), (0.5,))
    read = jnp.tile(jnp.arange(16), (4, 1))

    @jax.jit
    def by_hand(params, frozen):
        hidden = parts.masked_indices(KEYS)
        labels = parts.target.labels(frozen, {"image": BATCH["image"] / 255})
        (logits,) = parts.model.apply({"params": params}, images, hidden, read=read)
        return logits, labels

    logits, labels = by_hand(params, every.frozen)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    trained = values(every, params, training=True)["loss"]
    np.testing.assert_allclose(trained, -picked.mean(), rtol=1e-5)
    assert abs(trained - values(masked, params, training=True)["loss"]) > 1e-3


def test_pixels_are_the_encoders_own_patch_by_patch():
    target = Pixels(2, (2, 3), 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    images = RANDOM.random((2, 4, 6, 3)).astype(np.float32)
    labels = target.labels({}, {"image": images})
    assert labels.shape == (2, 6, 12) and target.outputs == 12
    patch = (images[1, 2:4, 0:2] - (0.4, 0.5, 0.6)) / (0.2, 0.3, 0.4)  # the fourth, row by row
    np.testing.assert_allclose(labels[1, 3], patch.reshape(-1), rtol=1e-5)
    np.testing.assert_allclose(target.pictures({}, labels), images, atol=1e-6)


def test_pixels_as_target_need_no_tokenizer(tmp_path):
    changes = dict(tokenizer__path="", mim__target="pixels", model__early_layers=1)
    task, params = build(tmp_path, **changes)
    assert set(task.views) == {"image"} and not task.frozen and not task.copies
    found = values(task, params, training=True)
    assert found["loss"] == pytest.approx(found["final_loss"] + found["cls_loss"], rel=1e-6)
    parts = task.loss_fn.__self__
    images = normalize(BATCH["image"] / np.float32(255), (0.5,), (0.5,))
    hidden = jax.jit(parts.masked_indices)(KEYS)
    final, branch = jax.jit(parts.model.apply)({"params": params}, images, hidden)
    labels = parts.target.labels({}, {"image": BATCH["image"] / 255})
    labels = np.take_along_axis(np.asarray(labels), np.asarray(hidden)[..., None], axis=1)
    np.testing.assert_allclose(found["final_loss"], ((final - labels) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["cls_loss"], ((branch - labels) ** 2).mean(), rtol=1e-5)


def test_pixels_train_and_are_drawn(tmp_path):
    tree = tiny.config(
        "mim", tokenizer__path="", mim__target="pixels", train__steps=2, model__depth=1
    )
    tiny.run(tree, tmp_path, jax.devices()[:1]).execute("train")
    assert list((tmp_path / "pictures").glob("reconstruction_*.png"))


@pytest.mark.parametrize("changes", [{"mim__target": "hog"}, {"mim__predict": "none"}])
def test_unknown_choices_are_refused_by_name(tmp_path, changes):
    (key,) = changes
    with pytest.raises(UserError, match=f"config.{key.replace('__', '.')}="):
        build(tmp_path, **changes)
