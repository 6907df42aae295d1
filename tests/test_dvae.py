"""The dVAE against OpenAI's code, and its shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_files import checkpoint, load, nhwc, random_params, shapes, weights

from beit_jax.errors import UserError
from beit_jax.interop import dall_e
from beit_jax.interop.table import Table
from beit_jax.models.dvae import DVAE, Decoder, Encoder, ResidualBlock, map_pixels, unmap_pixels

# The golden weights are stored in half precision to keep them small; with the float32 originals the
# code agrees to 2e-6, so what is left below is the rounding of the weights.
SIZE = dict(vocabulary=512, width=64, groups=4, blocks_per_group=1)
TINY = dict(vocabulary=16, width=8, groups=2, blocks_per_group=2)


def test_encoder_agrees_with_the_official_code():
    golden, module = load("dall_e/tensors"), Encoder(**SIZE)
    mapped = map_pixels(nhwc(golden["image01"]))
    np.testing.assert_array_equal(mapped, nhwc(golden["mapped"]))
    params = weights(module, Table("DALL-E", dall_e.RULES), checkpoint("dall_e/encoder"), mapped)
    logits = jax.jit(module.apply)({"params": params}, mapped)
    np.testing.assert_allclose(logits, nhwc(golden["z_logits"]), atol=2e-3)
    np.testing.assert_array_equal(logits.argmax(axis=-1), golden["tokens"])


def test_decoder_agrees_with_the_official_code():
    golden, module = load("dall_e/tensors"), Decoder(**SIZE, decoder_input=32)
    codes = jax.nn.one_hot(golden["tokens"], 512)
    params = weights(module, Table("DALL-E", dall_e.RULES), checkpoint("dall_e/decoder"), codes)
    stats = jax.jit(module.apply)({"params": params}, codes)
    np.testing.assert_allclose(stats, nhwc(golden["decoder_stats"]), atol=5e-4)
    pixels = unmap_pixels(jax.nn.sigmoid(stats[..., :3]))
    np.testing.assert_allclose(pixels, nhwc(golden["reconstruction01"]), atol=2e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_any_number_of_groups_channels_and_image_sides(groups):
    factor = 2 ** (groups - 1)
    module = DVAE(vocabulary=16, width=8, groups=groups, blocks_per_group=1, channels=5)
    images = jax.ShapeDtypeStruct((2, 3 * factor, 2 * factor, 5), jnp.float32)
    (logits, stats), _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, 3, 2, 16)
    assert stats.shape == (2, 3 * factor, 2 * factor, 10)


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="config.dvae.groups"):
        shapes(Encoder(**TINY), jnp.zeros((1, 8, 9, 3)))


def test_residual_gain_and_hidden_width():
    module = ResidualBlock(8, (3, 3, 3, 1), gain=0.25)
    x = np.random.default_rng(1).standard_normal((1, 4, 4, 8), np.float32)
    params = random_params(module, x)
    assert set(params) == {"conv_1", "conv_2", "conv_3", "conv_4"}
    assert params["conv_1"]["kernel"].shape == (3, 3, 8, 2)
    apply = jax.jit(module.apply)
    before = apply({"params": params}, x)
    params["conv_4"]["bias"] = params["conv_4"]["bias"] + 1  # `before` may still read the old one
    np.testing.assert_allclose(apply({"params": params}, x) - before, 0.25, atol=1e-6)


def test_gain_of_the_published_size_is_a_64th():
    found = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, ResidualBlock):
            found.append(context.module.gain)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes(DVAE(vocabulary=8192), jnp.zeros((1, 32, 32, 3)))
    assert found == [1 / 64] * 16


def test_initial_weights():
    init = jax.jit(DVAE(**TINY | {"blocks_per_group": 1}, decoder_input=64).init)
    params = init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias":
            assert not value.any()
        elif value.size > 1000:
            np.testing.assert_allclose(value.std(), np.prod(value.shape[:3]) ** -0.5, rtol=0.1)


def test_encode_and_decode_are_the_two_halves():
    module = DVAE(**TINY)
    pixels = np.random.default_rng(1).uniform(0.1, 0.9, (2, 8, 12, 3)).astype(np.float32)
    variables = {"params": random_params(module, pixels)}
    apply = jax.jit(module.apply, static_argnames="method")
    logits, stats = apply(variables, pixels)
    np.testing.assert_allclose(apply(variables, pixels, method="encode"), logits, rtol=1e-5)
    read = np.array([[5, 0], [23, 4]])  # of 4 x 6
    some = np.take_along_axis(np.asarray(logits).reshape(2, 24, -1), read[:, :, None], axis=1)
    np.testing.assert_allclose(apply(variables, pixels, read, method="encode"), some, rtol=1e-5)
    codes = jax.nn.softmax(logits)
    np.testing.assert_allclose(apply(variables, codes, method="decode"), stats, atol=1e-5)


def test_bfloat16_keeps_logits_and_statistics_in_float32():
    pixels = np.random.default_rng(1).uniform(0.1, 0.9, (2, 8, 8, 3)).astype(np.float32)
    variables = {"params": random_params(DVAE(**TINY), pixels)}
    high = jax.jit(DVAE(**TINY).apply)(variables, pixels)
    low = jax.jit(DVAE(**TINY, dtype=jnp.bfloat16).apply)(variables, pixels)
    for a, b in zip(low, high, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.05 * float(np.abs(b).max()))


def test_pixel_maps_are_inverse_and_clip():
    pixels = np.linspace(0, 1, 11)
    np.testing.assert_allclose(map_pixels(pixels)[[0, 10]], [0.1, 0.9], rtol=1e-6)
    np.testing.assert_allclose(unmap_pixels(map_pixels(pixels)), pixels, atol=1e-6)
    np.testing.assert_array_equal(unmap_pixels(jnp.array([0.0, 1.0])), [0, 1])
