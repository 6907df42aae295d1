"""Gradients written by hand are those of the definitions."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from beit_jax.models.ops import attend, layer_norm

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
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (3, 2, 7, 4)
    q, k, v, wanted = (jax.random.normal(key, shape, dtype) for key in keys[:4])
    bias = jax.random.normal(keys[4], (2, 7, 7)) if biased else None

    def defined(q, k, v, bias):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        logits = jnp.einsum("bhqd,bhkd->bhqk", q / 2, k)
        logits = logits if bias is None else logits + bias[None]
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(logits), v).astype(dtype)

    found, ours = jax.vjp(attend, q, k, v, bias)
    expected, derived = jax.vjp(defined, q, k, v, bias)
    chex.assert_trees_all_close((found, ours(wanted)), (expected, derived(wanted)), atol=close)
