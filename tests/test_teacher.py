"""Frozen teachers: what they see, what they give, and which ones are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from beit_jax import checkpoint, frozen, tasks, teacher
from beit_jax.architecture import make_encoder, make_tower
from beit_jax.errors import UserError

IMAGES = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
MEAN, STD = 0.25, 0.4


def random_teacher(folder, task="mim", outputs=16, **changes):
    tree = tiny.config("mim", model__mean=(MEAN,), model__std=(STD,), **changes)
    tree.task = task
    return tiny.random_network(folder, tree, outputs)


def loaded(folder, dtype="float32"):
    weights = checkpoint.load_weights(str(folder), "a test")
    return weights, teacher.from_weights(weights, "a test", dtype)


def features_of(found):
    return jax.jit(found.features)(found.variables, IMAGES)


@pytest.mark.parametrize("projection", [0, 24])
def test_a_tower_gives_projected_or_normed_patches_of_its_own_pixels(projection, tmp_path):
    weights, found = loaded(random_teacher(tmp_path, "teacher", projection))
    tower = make_tower(weights.config, projection)
    expected = jax.jit(tower.apply)({"params": weights.params}, (IMAGES - MEAN) / STD)
    expected = (expected.projected if projection else expected.tokens)[:, 1:]
    np.testing.assert_allclose(features_of(found), expected, atol=1e-5)
    assert (found.width, found.grid, found.channels) == (projection or 32, (4, 4), 1)
    assert found.view == ((8, 8), "bicubic")


@pytest.mark.parametrize(("task", "outputs"), [("mim", 16), ("classify", 10), ("encoder", 0)])
def test_any_encoder_gives_standardised_patches_of_its_last_block(task, outputs, tmp_path):
    weights, found = loaded(random_teacher(tmp_path, task, outputs))
    encoder = make_encoder(weights.config)
    variables = {"params": weights.params["encoder"]}
    patches = jax.jit(encoder.apply)(variables, (IMAGES - MEAN) / STD).states[-1]
    patches = np.asarray(patches)[:, 1:]
    centred = patches - patches.mean(-1, keepdims=True)
    expected = centred / np.sqrt(patches.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(features_of(found), expected, atol=1e-4)
    assert set(found.variables["params"]) == set(weights.params["encoder"])  # and no head


def test_the_body_computes_in_the_dtype_that_is_asked_for(tmp_path):
    folder = random_teacher(tmp_path, "teacher", 24)
    full, half = (loaded(folder, dtype)[1] for dtype in ("float32", "bfloat16"))
    a, b = features_of(full), features_of(half)
    assert a.dtype == b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


@pytest.mark.parametrize(
    ("teacher_changes", "changes", "said"),
    [
        ({}, {"vqkd__teacher_width": 24}, "of width 32, .*--config.vqkd.teacher_width=32"),
        ({}, {"data__image_size": (16, 16)}, "as 4x4 patches, the tokenizer as 8x8"),
        ({"data__channels": 3}, {}, "reads 3 channels, but config.data.channels=1"),
        ({}, {"model__drop_path": 0.1}, "config.model.drop_path=0.1"),
        ({}, {"model__mean": (0.4,)}, "config.model.mean"),
        ({}, {"teacher__path": ""}, "config.teacher.path is empty: .* import one"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_sentence(teacher_changes, changes, said, tmp_path):
    folder = random_teacher(tmp_path / "teacher", **teacher_changes)
    config = tiny.config("vqkd", **{"teacher__path": str(folder), **changes})
    with pytest.raises(UserError, match=said):
        tasks.build(config, tiny.Images(64), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_pixels_is_no_teacher(tmp_path):
    folder = tiny.random_network(tmp_path / "dvae", tiny.config("dvae"), 0)
    config = tiny.config("vqkd", teacher__path=str(folder))
    with pytest.raises(UserError, match="is of task 'dvae' and holds no encoder"):
        tasks.build(config, tiny.Images(64), tmp_path / "run")


def test_a_teacher_of_another_size_has_a_view_of_its_own(tmp_path):
    """The same 4x4 patches, of 4 pixels each: the crop is seen twice, by each as it needs."""
    folder = random_teacher(tmp_path / "t", data__image_size=(16, 16), model__patch_size=4)
    task = tasks.build(
        tiny.config("vqkd", teacher__path=str(folder)), tiny.Images(64), tmp_path / "run"
    )
    assert {name: view.size for name, view in task.views.items()} == {
        "image": (8, 8), "teacher_image": (16, 16)
    }  # fmt: skip
    batch = {"image": IMAGES, "teacher_image": np.zeros((2, 16, 16, 1), np.float32)}

    def loss(key):
        params, state = task.init(key)
        return task.loss_fn(params, state, task.frozen, batch, jax.random.split(key, 2), 0)

    (total, weight), _ = jax.eval_shape(loss, jax.random.key(0))
    assert total.shape == weight.shape == ()


def test_the_run_keeps_a_copy_and_refuses_another(tmp_path):
    first, other = (random_teacher(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    config = tiny.config("vqkd", teacher__path=str(first))
    built = tasks.build(config, tiny.Images(64), tmp_path / "run")
    frozen.keep(tmp_path / "run", built.copies)
    config.teacher.path = str(other)
    with pytest.raises(UserError, match="holds the teacher of .*names another"):
        tasks.build(config, tiny.Images(64), tmp_path / "run")
    config.teacher.path = ""
    again = tasks.build(config, tiny.Images(64), tmp_path / "run")
    assert not again.copies
    jax.tree.map(np.testing.assert_array_equal, built.frozen, again.frozen)
