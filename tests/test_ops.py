"""Gradients written by hand are those of the definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from beit_jax.models import ops
from beit_jax.models.ops import attend, exact_product, float32_product, layer_norm

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("bfloat16", 0.06)])
@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6)])
def test_layer_norm_has_the_gradient_of_its_definition(dtype, close, shape):
    keys = jax.random.split(jax.random.key(0), 4)
    x, wanted = (3 + 2 * jax.random.normal(key, shape, dtype) for key in keys[:2])
    scale, bias = (jax.random.normal(key, shape[-1:]) for key in keys[2:])

    def defined(x, scale, bias):
        norm = nn.LayerNorm(epsilon=0.1, use_fast_variance=False, dtype=jnp.float32)
        y = norm.apply({"params": {"scale": scale, "bias": bias}}, x.astype(jnp.float32))
        return y.astype(dtype)

    found, ours = jax.vjp(lambda *a: layer_norm(*a, 0.1), x, scale, bias)
    expected, derived = jax.vjp(defined, x, scale, bias)
    assert found.dtype == dtype
    chex.assert_trees_all_close((found, ours(wanted)), (expected, derived(wanted)), atol=close)


@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("biased", [True, False])
def test_attention_has_the_gradient_of_its_definition(dtype, close, biased):
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = jax.random.normal(keys[0], (3, 7, 3, 2, 4), dtype)
    wanted = jax.random.normal(keys[1], (3, 7, 2, 4), dtype)
    bias = jax.random.normal(keys[2], (2, 7, 7)) if biased else None

    def defined(qkv, bias):
        q, k, v = jnp.moveaxis(qkv.astype(jnp.float32), 2, 0)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q / 2, k)
        logits = logits if bias is None else logits + bias[None]
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v).astype(dtype)

    found, ours = jax.vjp(attend, qkv, bias)
    expected, derived = jax.vjp(defined, qkv, bias)
    chex.assert_trees_all_close((found, ours(wanted)), (expected, derived(wanted)), atol=close)


def test_no_token_attends_to_padding():
    keys = jax.random.split(jax.random.key(0), 2)
    qkv = jax.random.normal(keys[0], (3, 8, 3, 2, 4))
    bias = jax.random.normal(keys[1], (2, 7, 7))
    found = attend(qkv, bias)[:, :7]
    chex.assert_trees_all_close(found, attend(qkv[:, :7], bias), atol=1e-6)
    seen = attend(qkv, jnp.pad(bias, ((0, 0), (0, 1), (0, 1))))[:, :7]
    assert jnp.abs(found - seen).max() > 0.1


@pytest.mark.parametrize(
    "capability, dtype, width, expected",
    [
        ("9.0", "bfloat16", 64, True),
        ("8.0", "bfloat16", 128, True),
        ("7.5", "bfloat16", 64, False),
        ("9.0", "float32", 64, False),
        ("9.0", "bfloat16", 20, False),
        ("9.0", "bfloat16", 136, False),
    ],
)
def test_attention_is_fused_where_cudnn_can(capability, dtype, width, expected, monkeypatch):
    assert not ops.fuses(jnp.dtype(dtype), width)  # on a CPU
    tiny.pretend_gpu(monkeypatch, capability)
    assert ops.fuses(jnp.dtype(dtype), width) == expected
    for cpu in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(cpu):
            assert not ops.fuses(jnp.dtype(dtype), width)


def test_cudnn_gets_an_even_number_of_tokens_and_padding_is_cut_off(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 2)
    qkv = jax.random.normal(keys[0], (3, 7, 3, 2, 8), jnp.bfloat16)
    bias = jax.random.normal(keys[1], (2, 7, 7))
    expected, unbiased = attend(qkv, bias), attend(qkv, None)
    lengths = tiny.pretend_cudnn(monkeypatch)
    tiny.pretend_gpu(monkeypatch, "9.0")
    chex.assert_trees_all_close(attend(qkv, bias), expected, atol=0.05)
    chex.assert_trees_all_close(attend(qkv, None), unbiased, atol=0.05)
    assert lengths == [8, 7]


def product_operands(dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x in dtype, a kernel in float32 and a gradient of their product."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (40, 300)).astype(dtype)
    return x, jax.random.normal(keys[1], (300, 20)), jax.random.normal(keys[2], (40, 20))


def off(found, expected) -> float:
    """How far off an array is, as a share of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    "dtype, gradient_off", [("float32", 1e-6), ("bfloat16", 0.01), ("float16", 1e-3)]
)
def test_an_exact_product_does_not_round_its_kernel(dtype, gradient_off):
    x, kernel, wanted = product_operands(dtype)
    found, gradient = jax.jit(
        lambda *a: (exact_product(*a), jax.vjp(exact_product, *a)[1](wanted))
    )(x, kernel)
    wide = np.asarray(x, np.float64)
    exact = wide @ np.asarray(kernel, np.float64)
    rounded = float32_product(x, kernel.astype(dtype))
    assert found.dtype == jnp.float32 and off(found, exact) < 1e-5
    assert dtype == "float32" or off(rounded, exact) > 1e-4
    assert off(gradient[0], wanted @ kernel.T) < gradient_off
    assert off(gradient[1], wide.T @ wanted) < gradient_off


@pytest.mark.parametrize("dtype, gradient_off", [("float32", 1e-6), ("bfloat16", 0.01)])
def test_a_product_in_float32_has_gradients_in_the_operands_dtype(dtype, gradient_off):
    x, kernel, wanted = product_operands(dtype)
    kernel = kernel.astype(dtype)
    found, pull = jax.vjp(float32_product, x, kernel)
    wide = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    assert found.dtype == jnp.float32 and off(found, wide[0] @ wide[1]) < 1e-6
    gradient = pull(wanted)
    assert gradient[0].dtype == gradient[1].dtype == dtype
    assert off(gradient[0], wanted @ wide[1].T) < gradient_off
    assert off(gradient[1], wide[0].T @ wanted) < gradient_off


def test_gradients_below_float16_are_not_lost():
    x, kernel, wanted = product_operands("float16")
    x, wanted = 100 * x, 1e-8 * wanted  # float16 ends at 6e-8
    _, pull = jax.vjp(float32_product, x, kernel.astype("float16"))
    assert off(pull(wanted)[1], np.asarray(x, np.float64).T @ wanted) < 0.05
