"""Losses against numbers that can be worked out on paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import losses


def test_cross_entropy_of_known_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 3.0
    labels = jnp.array([1, 2])
    plain = losses.cross_entropy(logits, labels)
    np.testing.assert_allclose(plain, [math.log(4), -math.log(0.8)], rtol=1e-6)
    smooth = losses.cross_entropy(logits, labels, smoothing=0.3)
    rest = (math.log(2) + 2 * math.log(4)) / 3
    assert smooth[0] == pytest.approx(0.7 * math.log(4) + 0.3 * rest, rel=1e-6)


def test_cross_entropy_keeps_every_axis_and_gradient_is_softmax_minus_target():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    labels = jnp.array([[0, 1, 2], [3, 4, 0]])
    assert losses.cross_entropy(logits, labels).shape == (2, 3)
    gradient = jax.grad(lambda x: losses.cross_entropy(x, labels, 0.1).sum())(logits)
    target = 0.9 * jax.nn.one_hot(labels, 5) + 0.1 / 5
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - target, atol=1e-6)


@pytest.mark.parametrize("mean, log_scale", [(0.0, -0.5), (1.3, -1.0), (-0.7, 0.2)])
def test_logit_laplace_density_integrates_to_one(mean, log_scale):
    # In steps of the logit, so that the ends of (0, 1) are resolved as well as the middle.
    x = 1 / (1 + np.exp(-np.linspace(-14, 14, 400_001)))
    stats = jnp.broadcast_to(jnp.array([mean, log_scale]), (len(x), 2))
    density = np.exp(-np.asarray(losses.logit_laplace(stats, jnp.array(x)[:, None])))[:, 0]
    assert np.trapezoid(density, x) == pytest.approx(1.0, abs=3e-4)


def test_logit_laplace_by_hand_with_means_first_and_scales_last():
    # x = 1/2, mu = 0, b = 1: density 1 / (2 * 1/4) = 2. x = 0.8, mu = ln 4 - 1, b = 2:
    # distance |ln 4 - mu| / b = 1/2, density exp(-1/2) / (2 * 2 * 0.16).
    stats = jnp.array([[0.0, math.log(4) - 1, 0.0, math.log(2)]])
    loss = losses.logit_laplace(stats, jnp.array([[0.5, 0.8]]))
    np.testing.assert_allclose(loss, [[-math.log(2), 0.5 + math.log(0.64)]], rtol=1e-6)


def test_logit_laplace_is_least_at_the_pixel():
    mapped = jnp.full((4, 4, 1), 0.3)
    at_pixel = jnp.log(0.3 / 0.7)
    gradient = jax.grad(lambda mean, log_scale: losses.logit_laplace(
        jnp.stack([jnp.full((4, 4), mean), jnp.full((4, 4), log_scale)], -1), mapped
    ).sum(), argnums=(0, 1))  # fmt: skip
    below, _ = gradient(at_pixel - 0.1, -1.0)
    above, _ = gradient(at_pixel + 0.1, -1.0)
    assert below < 0 < above
    # The best ln b for a distance d is ln d: its gradient, 1 - d / b, vanishes there.
    _, scale = gradient(at_pixel + 0.1, jnp.log(0.1))
    assert abs(scale) < 1e-4


def test_kl_to_uniform_by_hand_and_at_its_ends():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    # Entropy 1.75 bits of at most 2.
    assert losses.kl_to_uniform(logits) == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert losses.kl_to_uniform(jnp.full((2, 8), 3.0)) == pytest.approx(0.0, abs=1e-6)
    one_code = jnp.zeros(8).at[3].set(1e4)
    assert losses.kl_to_uniform(one_code) == pytest.approx(math.log(8), rel=1e-6)
    assert losses.kl_to_uniform(jnp.zeros((2, 3, 4, 8))).shape == (2, 3, 4)


def test_kl_to_uniform_has_finite_gradients_for_certain_codes():
    gradient = jax.grad(lambda x: losses.kl_to_uniform(x).sum())(jnp.zeros(8).at[3].set(1e4))
    assert np.isfinite(gradient).all()


def test_losses_of_half_precision_inputs_are_float32():
    logits = jnp.array([[300.0, 299.0, 0.0]], jnp.bfloat16)
    stats, mapped = jnp.array([[0.5, 0.25]], jnp.bfloat16), jnp.array([[0.25]], jnp.bfloat16)
    label = jnp.array([1])
    for loss, inputs in [
        (lambda x: losses.cross_entropy(x, label, 0.1), (logits,)),
        (losses.kl_to_uniform, (logits,)),
        (losses.logit_laplace, (stats, mapped)),
    ]:
        narrow = loss(*inputs)
        assert narrow.dtype == jnp.float32
        np.testing.assert_array_equal(narrow, loss(*(x.astype(jnp.float32) for x in inputs)))
