"""Arithmetic of the layers whose gradient is not left to JAX alone.

What a derivative is made of is either kept or computed again; which is cheaper was measured.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's integral up to x, by erf in float32 as PyTorch computes it.

    flax's, by erfc, is exact further down the tail but takes three times as long on a CPU.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 2**-0.5))).astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of `gelu`."""
    return x * nn.sigmoid(1.702 * x)


# In the backward pass they are computed again from their input: of the several wide arrays that
# their derivatives are made of none is kept.
ACTIVATIONS = {"gelu": jax.checkpoint(gelu), "quick_gelu": jax.checkpoint(quick_gelu)}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation (Ba et al. 2016) of [..., D] in float32, returned in x's dtype.

    The gradient is written out, since the derived one keeps or computes more: with normalised x as
    n and the gradient of n as d, that of x is (d - mean(d) - n mean(d n)) / deviation.
    """
    return _layer_norm(x, scale, bias, epsilon)[0]


def _layer_norm(x, scale, bias, epsilon):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + epsilon)
    y = (y - mean) * inverse * _as_last(scale, x) + _as_last(bias, x)
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_backward(epsilon, kept, d_y):
    x, scale, mean, inverse = kept
    d_y, normed = d_y.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    d = d_y * _as_last(scale, x)
    d_x = d - d.mean(-1, keepdims=True) - normed * (d * normed).mean(-1, keepdims=True)
    tokens = range(x.ndim - 1)
    return (d_x * inverse).astype(x.dtype), (d_y * normed).sum(tokens), d_y.sum(tokens)


layer_norm.defvjp(_layer_norm, _layer_norm_backward)


def _as_last(values: jax.Array, x: jax.Array) -> jax.Array:
    """[D] with as many axes as x."""
    return jnp.expand_dims(values, range(x.ndim - 1))


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Scaled dot-product attention: q, k, v [B, heads, L, d], bias float32 [heads, L, L] or None.

    The gradient is written out, since the derived one is slower and keeps more. With weights P and
    output O that of the logits is P (dP - D), where D sums dO O over d numbers (Dao et al. 2022,
    section 3.1) in place of dP P over L, and products are of the compute dtype.
    """
    return _attend(q, k, v, bias)[0]


def _attend(q, k, v, bias):
    q = q * q.shape[-1] ** -0.5
    logits = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[None]
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = weights @ v
    return out, (q, k, v, bias, weights, out)


def _attend_backward(kept, d_out):
    q, k, v, bias, weights, out = kept
    d_v = weights.mT @ d_out
    mean = jnp.sum(d_out * out, axis=-1, keepdims=True, dtype=jnp.float32)
    d_weights = jnp.matmul(d_out, v.mT, preferred_element_type=jnp.float32)
    d_logits = weights * (d_weights - mean)
    d_bias = None
    if bias is not None:  # a product with ones: XLA's own sum over the batch takes a CPU's one core
        d_bias = jnp.einsum("b,bhqk->hqk", jnp.ones(len(q)), d_logits)
    d_logits = d_logits.astype(v.dtype)
    return (d_logits @ k) * q.shape[-1] ** -0.5, d_logits.mT @ q, d_v, d_bias


attend.defvjp(_attend, _attend_backward)
