"""A decoder of pixels on a frozen tokenizer: the same tokens, and pictures besides."""

import shutil

import jax
import numpy as np
import pytest
import tiny
from sklearn.datasets import load_digits

from beit_jax import checkpoint, frozen, metrics, tasks
from beit_jax.errors import UserError
from beit_jax.tokenizer import from_weights

ONE = slice(1)
IMAGES = (load_digits().images[:8, ..., None] / 16).astype(np.float32)


@pytest.fixture(scope="module")
def vqkd(tmp_path_factory):
    return tiny.random_network(tmp_path_factory.mktemp("vqkd"), tiny.config("vqkd"), 0)


@pytest.fixture(scope="module")
def decoded(vqkd, tmp_path_factory):
    """The folder of a decoder trained for a few updates; its tokenizer's folder is gone."""
    folder, original = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("vqkd") / "moved"
    shutil.copytree(vqkd, original)
    tree = tiny.config("pixel_decoder", tokenizer__path=str(original), train__steps=8)
    tiny.run(tree, folder, jax.devices()[ONE]).execute("train")
    shutil.rmtree(original)
    return folder


def tokenizer_of(folder):
    return from_weights(frozen.read(str(folder), "a test"), "a test", "float32")


def test_its_run_is_the_tokenizer_with_pictures(vqkd, decoded):
    plain, found = tokenizer_of(vqkd), tokenizer_of(decoded)
    assert plain.pictures is None and plain.nats is None
    tokens = jax.jit(found.tokens)(found.variables, IMAGES)
    np.testing.assert_array_equal(tokens, jax.jit(plain.tokens)(plain.variables, IMAGES))
    last = np.full((len(IMAGES), 1), 15)
    some = jax.jit(found.tokens)(found.variables, IMAGES, last)
    np.testing.assert_array_equal(some, tokens[:, -1, -1:])
    assert (found.vocabulary, found.factor, found.grid) == (16, 2, (4, 4))
    pictures = np.asarray(found.pictures(found.variables, tokens))
    assert pictures.shape == IMAGES.shape and 0 <= pictures.min() < pictures.max() <= 1


def test_it_learns_and_its_nats_are_those_of_its_evaluation(decoded):
    lines = metrics.read(decoded)
    train = [line["loss"] for line in lines if line["split"] == "train"]
    assert train[-1] < train[0] - 0.1
    found = tokenizer_of(decoded)

    @jax.jit
    def nats(variables, images):
        return found.nats(variables, found.tokens(variables, images), images)

    run = tiny.run(checkpoint_config(decoded), decoded, jax.devices()[ONE])
    total, count = 0.0, 0
    for batch in run.split_batches("validation"):
        per_image = np.asarray(nats(found.variables, batch["image"] / 255))
        total, count = total + per_image[batch["valid"]].sum(), count + int(batch["valid"].sum())
    evaluation = [line for line in lines if line["split"] == "validation"][-1]
    np.testing.assert_allclose(total / count / 64, evaluation["loss"], rtol=1e-5)
    assert 0 < evaluation["usage"] <= 1 and evaluation["squared_error"] > 0
    assert list((decoded / "pictures").glob("reconstruction_*.png"))
    assert list((decoded / "pictures").glob("codes_*.png"))


def checkpoint_config(folder):
    tree = tiny.config("pixel_decoder")
    tree.update_from_flattened_dict(
        {"tokenizer.path": checkpoint.read_config(folder)["tokenizer"]["path"]}
    )
    return tree


def test_pre_training_keeps_all_of_it(decoded, tmp_path):
    """Tokenizer and decoder are copied together, so the run needs neither folder afterwards."""
    original = tmp_path / "decoder"
    shutil.copytree(decoded, original)
    tree = tiny.config("mim", tokenizer__path=str(original), train__steps=0, train__epochs=0.0)
    tiny.run(tree, tmp_path / "mim", jax.devices()[ONE]).execute("train")
    shutil.rmtree(original)
    tiny.run(tree, tmp_path / "mim", jax.devices()[ONE]).execute("eval")
    trained, again = (x for x in metrics.read(tmp_path / "mim") if x["split"] == "validation")
    assert again == trained
    assert trained["evidence_bound"] == pytest.approx(
        -trained["reconstruction_nats"] - trained["masked_token_nats"], rel=1e-5
    )
    assert list((tmp_path / "mim" / "pictures").glob("reconstruction_*.png"))


def test_half_a_copy_is_refused(decoded, tmp_path):
    shutil.copytree(decoded, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "frozen")
    with pytest.raises(UserError, match="lacks frozen/tokenizer; copy the whole folder"):
        tokenizer_of(tmp_path / "half")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dvae__groups": 3}, "stands for 2x2 pixels, .* give --config.dvae.groups=2"),
        ({"data__image_size": (16, 16)}, "takes images of 8x8; give this size"),
        ({"data__channels": 3, "model__mean": (0.5,)}, "was trained on 1 channels"),
        ({"tokenizer__path": ""}, "config.tokenizer.path is empty"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(vqkd, tmp_path, changes, said):
    tree = tiny.config("pixel_decoder", **{"tokenizer__path": str(vqkd), **changes})
    with pytest.raises(UserError, match=said):
        tasks.build(tree, tiny.Images(64), tmp_path)
