"""Parts of the transformer: position index, stochastic depth, initial draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import random_params, shapes

from beit_jax.errors import UserError
from beit_jax.models.layers import (
    FINETUNE_INIT,
    Attention,
    Block,
    PatchEmbed,
    clipped_normal,
    drop_path,
)
from beit_jax.models.positions import (
    RelativePositionBias,
    relative_position_index,
    relative_position_rows,
)


def index_by_definition(height: int, width: int) -> np.ndarray:
    """The index matrix by loops over query and key, straight from its definition."""
    rows = (2 * height - 1) * (2 * width - 1) + 3
    index = np.zeros((height * width + 1,) * 2, int)
    for query in range(height * width):
        for key in range(height * width):
            down = query // width - key // width
            right = query % width - key % width
            row = (down + height - 1) * (2 * width - 1) + right + width - 1
            index[query + 1, key + 1] = row
    index[0, :] = rows - 3
    index[:, 0] = rows - 2
    index[0, 0] = rows - 1
    return index


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (2, 5), (7, 3)])
def test_relative_position_index(grid):
    index = relative_position_index(grid)
    np.testing.assert_array_equal(index, index_by_definition(*grid))
    assert set(np.unique(index[1:, 1:])) == set(range(relative_position_rows(grid) - 3))


@pytest.mark.parametrize(("size", "rows"), [(14, 732), (24, 2212), (32, 3972), (40, 6244)])
def test_rows_of_the_published_tables(size, rows):
    assert relative_position_rows((size, size)) == rows


def test_relative_position_bias_looks_up_head_by_head():
    module = RelativePositionBias((2, 3), heads=2)
    table = jnp.arange(36.0).reshape(18, 2)
    bias = module.apply({"params": {"table": table}})
    assert bias.shape == (2, 7, 7) and bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[1], table[index_by_definition(2, 3), 1])


def test_patch_embedding_is_the_strided_convolution():
    images = np.random.default_rng(1).standard_normal((2, 4, 6, 5), np.float32)
    module = PatchEmbed(2, 8, FINETUNE_INIT)
    params = random_params(module, images)
    assert params["kernel"].shape == (2, 2, 5, 8)
    conv = jax.lax.conv_general_dilated(
        images, params["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = conv.reshape(2, 6, 8) + params["bias"][None, None]
    np.testing.assert_allclose(module.apply({"params": params}, images), expected, atol=1e-5)


def test_images_must_be_whole_patches():
    with pytest.raises(UserError, match="config.model.patch_size"):
        shapes(PatchEmbed(4, 8, FINETUNE_INIT), jnp.zeros((1, 8, 10, 3)))


def test_keys_have_no_bias_and_queries_and_values_do():
    x = np.random.default_rng(1).standard_normal((1, 3, 8), np.float32)
    params = random_params(Attention(2), x)
    assert set(params) == {"q_bias", "v_bias", "qkv", "proj"}
    assert set(params["qkv"]) == {"kernel"} and params["qkv"]["kernel"].shape == (8, 24)
    params = params | {"v_bias": np.ones(8), "qkv": {"kernel": np.zeros((8, 24))}}
    # Weights sum to 1, so values of 1 everywhere come out as 1 before the projection.
    expected = params["proj"]["kernel"].sum(axis=0) + params["proj"]["bias"]
    out = jax.jit(Attention(2).apply)({"params": params}, x)
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-5)


def test_stochastic_depth_of_a_row_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(0), 64)
    factors = drop_path(keys, 0.5)
    order = jax.random.permutation(jax.random.key(1), 64)
    np.testing.assert_array_equal(drop_path(keys[order], 0.5), factors[order])
    np.testing.assert_array_equal(drop_path(keys[7:9], 0.5), factors[7:9])


def test_stochastic_depth_keeps_the_expectation():
    rate, count = 0.3, 20_000
    factors = np.asarray(drop_path(jax.random.split(jax.random.key(0), count), rate))
    np.testing.assert_allclose(np.unique(factors), [0, 1 / (1 - rate)], rtol=1e-6)
    deviation = np.sqrt(rate / (1 - rate) / count)
    np.testing.assert_allclose(factors.mean(axis=0), [1, 1], atol=4 * deviation)
    # The two branches are dropped independently of each other.
    both = (factors == 0).all(axis=1).mean()
    assert abs(both - rate**2) < 4 * np.sqrt(rate**2 / count)


def test_block_adds_what_stochastic_depth_leaves():
    x = np.random.default_rng(1).standard_normal((8, 5, 16), np.float32)
    module = Block(2, layer_scale=0.1, drop_path=0.5)
    apply, variables = jax.jit(module.apply), {"params": random_params(module, x)}
    keys = jax.random.split(jax.random.key(2), 8)
    factors = np.asarray(drop_path(keys, 0.5))
    changed = np.abs(apply(variables, x, None, keys) - x).max(axis=(1, 2)) > 0
    np.testing.assert_array_equal(changed, factors.any(axis=1))
    assert not changed.all() and changed.any()
    # Without keys nothing is dropped and nothing is scaled.
    plain = jax.jit(Block(2, layer_scale=0.1).apply)(variables, x)
    np.testing.assert_array_equal(apply(variables, x), plain)


def test_initial_draws_have_the_published_spread():
    draw = np.asarray(clipped_normal(jax.random.key(0), (200, 200)))
    assert np.abs(draw).max() <= 0.02
    np.testing.assert_allclose(draw.std(), 0.0108, rtol=0.01)
    draw = np.asarray(FINETUNE_INIT.weight(jax.random.key(0), (200, 200)))
    np.testing.assert_allclose(draw.std(), 0.02, rtol=0.02)
    assert np.abs(draw).max() > 0.06
    bound = (4 * 4 * 3) ** -0.5
    for draw in (
        FINETUNE_INIT.patch_kernel(jax.random.key(0), (4, 4, 3, 500)),
        FINETUNE_INIT.patch_bias(48)(jax.random.key(0), (24_000,)),
    ):
        np.testing.assert_allclose([draw.min(), draw.max()], [-bound, bound], rtol=1e-2)
        np.testing.assert_allclose(draw.std(), bound / 3**0.5, rtol=0.02)
