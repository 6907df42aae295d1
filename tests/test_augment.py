"""Normalisation and colour jitter against slow, plain versions of the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import augment
from beit_jax.errors import UserError

RNG = np.random.default_rng(0)


def _keys(num: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), num)


def _plain_jitter(image, factors, order):
    """torchvision's ColorJitter on one image [H, W, 3]."""
    for factor, operation in zip(factors, order, strict=True):
        grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
        other = [0.0, grey.mean(), grey][operation]
        image = np.clip(factor * image + (1 - factor) * other, 0, 1)
    return image


def test_normalize_by_hand():
    images = jnp.array([[[[0, 51, 255]]]], jnp.uint8)
    out = augment.normalize(images, (0.5, 0.1, 0.0), (0.5, 0.2, 4.0))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, [[[[-1.0, 0.5, 0.25]]]], rtol=1e-6)
    np.testing.assert_allclose(augment.normalize(images, (0.5,), (0.5,)), [[[[-1, -0.6, 1]]]])


def test_normalize_judges_by_dtype_not_by_values():
    dark = jnp.ones((1, 2, 2, 5), jnp.uint8)  # also: more channels than three
    out = augment.normalize(dark, (0.0,), (1.0,))
    np.testing.assert_allclose(out, 1 / 255, rtol=1e-6)
    np.testing.assert_array_equal(augment.normalize(dark / 255.0, (0.0,), (1.0,)), out)
    with pytest.raises(TypeError, match="int32"):
        augment.normalize(dark.astype(jnp.int32), (0.0,), (1.0,))


@pytest.mark.parametrize(
    "mean, std, key",
    [((0.5, 0.5), (1.0,), "config.model.mean"), ((0.5,), (1.0, 1.0), "config.model.std"),
     ((0.5,), (0.0,), "config.model.std")],
)  # fmt: skip
def test_normalize_refuses_what_does_not_fit(mean, std, key):
    with pytest.raises(UserError, match=key):
        augment.normalize(jnp.zeros((1, 2, 2, 3), jnp.uint8), mean, std)


def test_color_jitter_is_torchvisions():
    images = RNG.integers(0, 256, (40, 9, 7, 3)).astype(np.uint8)
    keys = _keys(40)
    (out,) = jax.jit(lambda k, x: augment.color_jitter(k, (x,), 0.8))(keys, images)
    factors, order = (np.asarray(x) for x in augment.jitter_draws(keys, 0.8))
    assert len({tuple(row) for row in order}) == 6
    for i in range(40):
        want = _plain_jitter(images[i] / 255.0, factors[i], order[i])
        np.testing.assert_allclose(out[i], want, atol=2e-6)
    assert out.dtype == jnp.float32 and out.min() >= 0 and out.max() <= 1


def test_factors_cover_their_range_and_orders_are_alike():
    factors, order = augment.jitter_draws(_keys(6_000), 0.4)
    assert factors.min() >= 0.6 and factors.max() < 1.4
    np.testing.assert_allclose(factors.mean(axis=0), 1.0, atol=0.015)
    np.testing.assert_allclose(factors.std(axis=0), 0.8 / 12**0.5, rtol=0.05)
    assert abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.06
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 6 and abs(counts - 1_000).max() < 130
    strong, _ = augment.jitter_draws(_keys(500), 1.5)
    assert strong.min() >= 0.0 and strong.max() > 2.2


def test_views_of_an_example_share_the_transform():
    """A colour becomes the same colour in each view, whatever else the view shows."""
    first = RNG.random((8, 6, 6, 3)).astype(np.float32)
    second = RNG.random((8, 4, 10, 3)).astype(np.float32)
    second[:, 0, 0] = first[:, 2, 3]
    out_first, out_second = augment.color_jitter(_keys(8), (first, second), 0.4)
    assert out_second.shape == second.shape
    np.testing.assert_allclose(out_second[:, 0, 0], out_first[:, 2, 3], atol=1e-6)
    alone = augment.color_jitter(_keys(8), (first,), 0.4)[0]
    np.testing.assert_array_equal(alone, out_first)


def test_an_examples_jitter_depends_on_its_own_key_only():
    images = RNG.random((5, 4, 4, 3)).astype(np.float32)
    (whole,) = augment.color_jitter(_keys(5), (images,), 0.4)
    (part,) = augment.color_jitter(_keys(5)[2:4], (images[2:4],), 0.4)
    np.testing.assert_allclose(part, whole[2:4], atol=1e-6)
    assert np.abs(whole - images).max(axis=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_change_brightness_and_contrast_only(channels):
    images = 0.4 + 0.2 * RNG.random((6, 5, 5, channels))
    (out,) = augment.color_jitter(_keys(6), (images.astype(np.float32),), 0.2)
    factors, order = (np.asarray(x) for x in augment.jitter_draws(_keys(6), 0.2))
    for i in range(6):
        want = images[i]
        for factor, operation in zip(factors[i], order[i], strict=True):
            other = [0.0, want.mean(), want][operation]
            want = factor * want + (1 - factor) * other
        np.testing.assert_allclose(out[i], want, atol=1e-6)


def test_no_jitter_is_the_identity_and_a_negative_one_is_refused():
    images = RNG.integers(0, 256, (2, 3, 3, 3)).astype(np.uint8)
    (out,) = augment.color_jitter(_keys(2), (images,), 0.0)
    np.testing.assert_array_equal(out, images.astype(np.float32) / np.float32(255))
    with pytest.raises(UserError, match="config.data.color_jitter"):
        augment.color_jitter(_keys(2), (images,), -0.1)


def test_no_host_callback():
    views = (jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 2, 2, 3)))
    jaxpr = str(jax.make_jaxpr(lambda k: augment.color_jitter(k, views, 0.4))(_keys(2)))
    assert "callback" not in jaxpr
