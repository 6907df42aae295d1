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
    # Barriers: XLA's GPU would compute numbers of a row again wherever they are used, in slower
    # kernels than those that read them.
    mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    d_y, normed = d_y.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    d = d_y * _as_last(scale, x)
    sums = d.mean(-1, keepdims=True), (d * normed).mean(-1, keepdims=True)
    d_mean, d_normed_mean = jax.lax.optimization_barrier(sums)
    d_x = (d - d_mean - normed * d_normed_mean) * inverse
    tokens = range(x.ndim - 1)
    return d_x.astype(x.dtype), (d_y * normed).sum(tokens), d_y.sum(tokens)


layer_norm.defvjp(_layer_norm, _layer_norm_backward)


def _as_last(values: jax.Array, x: jax.Array) -> jax.Array:
    """[D] with as many axes as x."""
    return jnp.expand_dims(values, range(x.ndim - 1))


@jax.custom_vjp
def float32_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [T, D'] times kernel [D', D], both of the compute dtype, summed and returned in float32.

    The gradient's products are of the compute dtype too: the derived ones would take the gradient
    of the output as float32, for which a GPU needs twice as long or more. Only float16 takes it so,
    whose range ends above the smallest of them.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _float32_product_backward(kept, d_y):
    x, kernel = kept
    if x.dtype != jnp.float16:
        d_y = d_y.astype(x.dtype)
    return (d_y @ kernel.T).astype(x.dtype), (x.T @ d_y).astype(kernel.dtype)


float32_product.defvjp(lambda *both: (float32_product(*both), both), _float32_product_backward)


def exact_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [T, D'] times kernel float32 [D', D], which is not rounded to x's dtype: float32 [T, D].

    Beside bfloat16 numbers the kernel is the sum of two, which keeps 16 bits of its 24 and takes a
    GPU a seventh of the time of a product in float32, in which other numbers are multiplied.
    """
    if x.dtype != jnp.bfloat16:
        return jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    upper = jax.lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=7)
    lower = jax.lax.stop_gradient(kernel - upper)  # the gradient of their sum is one product
    parts = jnp.concatenate([upper, lower]).astype(x.dtype)
    return float32_product(jnp.concatenate([x, x], axis=1), parts)


def attend(qkv: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Scaled dot-product attention: queries, keys, values [B, L, 3, heads, d] -> [B, L, heads, d].

    The bias is float32 [heads, N, N] or None; tokens behind the first N are padding, to which no
    token attends. In bfloat16 an NVIDIA GPU runs cuDNN's fused kernels, which round the bias too.
    """
    length, fused = qkv.shape[1], fuses(qkv.dtype, qkv.shape[-1])
    if bias is not None:
        even = length + length % 2 if fused else length
        qkv = jnp.pad(qkv, ((0, 0), (0, even - length), (0, 0), (0, 0), (0, 0)))
        rest = even - bias.shape[1]
        bias = jnp.pad(bias, ((0, 0), (0, rest), (0, 0)))
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, rest)), constant_values=-1e9)
    if fused:
        bias = None if bias is None else bias[None].astype(qkv.dtype)
        out = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), bias, implementation="cudnn")
        return out[:, :length]
    return _attend(qkv, bias)


def fuses(dtype: jnp.dtype, width: int) -> bool:
    """Whether cuDNN has kernels for the attention of heads of that width on the default device.

    That is in bfloat16 on NVIDIA's Ampere or newer, for a bias at an even number of tokens alone.
    """
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):  # the name of a platform
        device = jax.local_devices(backend=device)[0]
    nvidia = "cuda" in device.client.platform_version
    modern = nvidia and float(device.compute_capability) >= 8
    return modern and dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128


@jax.custom_vjp
def _attend(qkv, bias):
    """The gradient is written out, since the derived one is slower and keeps more.

    With weights P and output O that of the logits is P (dP - D), where D sums dO O over d numbers
    (Dao et al. 2022, section 3.1) in place of dP P over L, and products are of the compute dtype.
    """
    return _attend_forward(qkv, bias)[0]


def _attend_forward(qkv, bias):
    # Heads first: a CPU multiplies matrices that lie together twice as fast.
    q, k, v = (x.swapaxes(1, 2) for x in jnp.moveaxis(qkv, 2, 0))
    q = q * q.shape[-1] ** -0.5
    logits = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[None]
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = weights @ v
    return out.swapaxes(1, 2), (q, k, v, bias, weights, out)


def _attend_backward(kept, d_out):
    q, k, v, bias, weights, out = kept
    d_out = d_out.swapaxes(1, 2)
    d_v = weights.mT @ d_out
    mean = jnp.sum(d_out * out, axis=-1, keepdims=True, dtype=jnp.float32)
    d_weights = jnp.matmul(d_out, v.mT, preferred_element_type=jnp.float32)
    d_logits = weights * (d_weights - mean)
    d_bias = None
    if bias is not None:  # a product with ones: XLA's own sum over the batch takes a CPU's one core
        d_bias = jnp.einsum("b,bhqk->hqk", jnp.ones(len(q)), d_logits)
    d_logits = d_logits.astype(v.dtype)
    d_q = (d_logits @ k) * q.shape[-1] ** -0.5
    d_qkv = jnp.stack([x.swapaxes(1, 2) for x in (d_q, d_logits.mT @ q, d_v)], axis=2)
    return d_qkv, d_bias


_attend.defvjp(_attend_forward, _attend_backward)
