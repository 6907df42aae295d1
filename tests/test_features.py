"""Features from Python, and what they are worth."""

import jax
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


def test_classifiers_separate_what_is_separable():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    x = np.eye(3)[labels] * 4 + rng.normal(size=(90, 3))
    for classifier in (features.knn_classifier(5), features.linear_classifier()):
        assert classifier.fit(x[:60], labels[:60]).score(x[60:], labels[60:]) > 0.9


def test_neighbours_vote_by_similarity():
    """One close neighbour outvotes two far ones."""
    x = np.array([[1.0, 0.0], [0.5, 1.0], [0.5, 1.0]])
    classifier = features.knn_classifier(3).fit(x, [0, 1, 1])
    assert classifier.predict([[1.0, 0.1]]) == [0]


def test_block_and_pooling_are_chosen_on_one_split_and_scored_on_another(tmp_path, monkeypatch):
    """With extractors whose worth differs by split, the choice must be the selection split's."""
    rng = np.random.default_rng(0)
    good = {"validation": "cls", "test": "mean"}

    def batches(split):
        labels = rng.integers(0, 2, 64).astype(np.int32)
        image = np.zeros((64, 1, 1, 1), np.uint8) + labels[:, None, None, None].astype(np.uint8)
        marks = {"train": 2, "validation": 3, "test": 4}
        yield {
            "image": jax.numpy.asarray(image + 10 * np.uint8(marks[split])),
            "label": jax.numpy.asarray(labels),
            "valid": np.ones(64, bool),
        }

    def extractor(config):
        def extract(params, image):
            x = image.reshape(-1).astype(np.float32)
            signal, split = (x % 10)[:, None] * 2 - 1, x[0] // 10
            noise = jax.numpy.sin(jax.numpy.arange(64.0) * 7)[:, None]
            use_cls = (split == 2) | (split == 3)
            use_mean = (split == 2) | (split == 4)
            cls = jax.numpy.where(use_cls, signal, noise)
            mean = jax.numpy.where(use_mean, signal, noise)
            return {"cls": cls[:, None], "mean": mean[:, None]}

        return extract

    monkeypatch.setattr(features, "make_extractor", extractor)
    tree = tiny.config("mim", eval__probe=True, eval__pixels=False, data__eval_split="test")
    evaluator = features.make_evaluator(tree, ("even", "odd"))
    scores, _ = evaluator(features.Weights({"encoder": {}}, {}, {}), batches)
    assert scores["probe_from_cls"] == int(good["validation"] == "cls")
    assert scores["probe"] < 0.8  # "mean" would have scored 1 on the test split


def test_unlabelled_data_is_refused():
    with pytest.raises(UserError, match="need labels"):
        features.make_evaluator(tiny.config("mim"), ())
