"""Features from Python."""

import numpy as np
import pytest
import tiny

from beit_jax import architecture, features
from beit_jax.errors import UserError


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    tokenizer = tiny.random_tokenizer(tmp_path_factory.mktemp("dvae"))
    folder = tmp_path_factory.mktemp("mim")
    tree = tiny.config("mim", tokenizer__path=str(tokenizer), train__steps=2)
    tiny.run(tree, folder).execute("train")
    return folder


def test_five_lines_turn_images_into_features(pretrained):
    encoder = features.load(str(pretrained))
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 1), np.uint8)
    vectors = encoder(images)
    assert vectors.shape == (5, 32) and vectors.dtype == np.float32
    assert np.ptp(vectors, axis=0).min() > 0  # every image has features of its own
    first = encoder(images, block=0, pooling="cls")
    assert np.abs(first - vectors).max() > 1e-3


def test_preprocessing_comes_from_the_checkpoint(pretrained):
    """At the run's own size the features are those of the normalised pixels."""
    encoder = features.load(str(pretrained))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    network = architecture.make_encoder(encoder.config)
    params = encoder._params
    states = network.apply({"params": params}, (images / 255.0 - 0.5) / 0.5).states
    expected = np.asarray(states[-1][:, 1:].mean(1))
    np.testing.assert_allclose(encoder(images), expected, atol=1e-5)


def test_wrong_images_are_refused(pretrained):
    encoder = features.load(str(pretrained))
    with pytest.raises(UserError, match=r"the encoder reads uint8 \[B, H, W, 1\]"):
        encoder(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="float64"):
        encoder(np.zeros((2, 8, 8, 1)))


def test_a_tokenizer_is_no_encoder(tmp_path):
    with pytest.raises(UserError, match="holds no encoder"):
        features.load(str(tiny.random_tokenizer(tmp_path)))
