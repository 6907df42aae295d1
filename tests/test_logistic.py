"""Logistic regression on the devices: scikit-learn's optimum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_knn import placed

from beit_jax import logistic


@pytest.fixture(scope="module")
def data():
    """Three overlapping classes in 10 features of very unlike sizes, 300 rows."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 10)) @ rng.normal(size=(10, 10)) + 2 * np.eye(3, 10)[labels]
    x = np.float32(x * 10.0 ** np.arange(-4, 6) + 100.0)
    x[:, 3] = 7.3  # says nothing
    x[:, 4] = x[:, 5]  # says nothing new
    return x, labels


@pytest.mark.parametrize("devices", [1, 8])
def test_the_optimum_is_scikit_learns(data, devices):
    x, labels = data
    train = np.where(np.arange(300) < 200, labels, -1)  # the others weigh nothing
    features, placed_labels, _ = placed(x[None], train, 64, devices)
    fit = jax.jit(partial(logistic.fit, classes=3))
    linear = fit(features[:, 0], placed_labels)
    exact = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-9, max_iter=10_000))
    exact.fit(x[:200].astype(float), labels[:200])
    ours, theirs = (
        scores - scores.mean(1, keepdims=True)  # a shift of all logits means nothing
        for scores in (logistic.logits(linear, x), exact.decision_function(x.astype(float)))
    )
    np.testing.assert_allclose(ours, theirs, atol=5e-3)
    np.testing.assert_array_equal(ours.argmax(1), theirs.argmax(1))
    assert np.abs(theirs).max() > 5


def test_features_that_repeat_each_other_can_be_factored():
    """768 of them of 8 kinds, under the small ridge of ImageNet's number of images."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(6000, 8)) @ rng.normal(size=(8, 767)))
    x = np.concatenate([(x - x.mean(0)) / x.std(0), np.ones((6000, 1), np.float32)], axis=1)
    covariance = jnp.asarray(x.T @ x / 6000)
    ridge = jnp.ones((768, 1)).at[-1].set(0.0) / 1_281_167
    factor, _ = logistic._factored_bound(covariance, ridge)
    assert jnp.isfinite(factor).all()
