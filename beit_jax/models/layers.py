"""The transformer's parts: patch embedding, attention, MLP, block, and how their weights start.

Parameters are float32 throughout; `dtype` is that of the computation. Softmax, the statistics of
LayerNorm and the sums of the output heads stay float32 whatever it is.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from beit_jax.errors import UserError
from beit_jax.models.ops import ACTIVATIONS, attend, float32_product, layer_norm
from beit_jax.models.positions import RelativePositionBias

Initializer = initializers.Initializer
QKV_BIASES = ("qv", "qkv", "none")


def clipped_normal(key, shape, dtype=jnp.float32) -> jax.Array:
    """Normal of deviation 0.02 cut at +-1 deviation, which leaves a deviation of about 0.0108.

    Source: `trunc_normal_` of beit/modeling_pretrain.py, lines 21-22.
    """
    return 0.02 * jax.random.truncated_normal(key, -1.0, 1.0, shape, dtype)


def uniform_bias(fan_in: int) -> Initializer:
    """PyTorch's default for the bias of a convolution: uniform within 1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def zero_bias(fan_in: int) -> Initializer:
    """The bias that most layers start with."""
    del fan_in
    return initializers.zeros


class Init(NamedTuple):
    """How a transformer's weights start; gains, tables, q and v biases are the same for all.

    The biases are functions of the number of values that a layer sums.
    """

    weight: Initializer  # linear layers, tokens, absolute positions, heads
    patch_kernel: Initializer
    patch_bias: Callable[[int], Initializer]
    bias: Callable[[int], Initializer] = zero_bias  # linear layers


# PyTorch's default for linear layers and convolutions, with `uniform_bias`.
kaiming_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # a = sqrt(5)
# Masked image modelling, beit/modeling_pretrain.py lines 70-97.
MIM_INIT = Init(clipped_normal, clipped_normal, zero_bias)
# Classifiers, VQ-KD and segmentation, beit/modeling_finetune.py lines 289-317: the cut at +-2 (not
# +-2 deviations) never bites, and the patch embedding keeps PyTorch's default.
FINETUNE_INIT = Init(initializers.normal(0.02), kaiming_uniform, uniform_bias)
# What is created after the official code's own initialisation keeps PyTorch's defaults.
TORCH_INIT = Init(kaiming_uniform, kaiming_uniform, uniform_bias, uniform_bias)


def scaled(init: Initializer, factor: float) -> Initializer:
    """An initialiser's draw times a factor."""
    return lambda key, shape, dtype=jnp.float32: init(key, shape, dtype) * factor


class LayerNorm(nn.Module):
    """`layer_norm` with learned scale and bias: [..., D] -> [..., D] in `dtype`."""

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", initializers.ones, (x.shape[-1],))
        bias = self.param("bias", initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping square patches.

    images [B, H, W, ch] -> [B, N, D] in row-major order; H and W must be multiples of `patch_size`.
    """

    patch_size: int
    width: int
    initial: Init
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, (batch, height, width, channels) = self.patch_size, images.shape
        if height % size or width % size:
            raise UserError(
                f"config.data.image_size of {height}x{width} pixels is not a whole number of "
                f"patches of {size}x{size}: change it or config.model.patch_size"
            )
        shape = (size, size, channels, self.width)
        kernel = self.param("kernel", self.initial.patch_kernel, shape)
        # Same sums as the usual strided convolution, but one matrix product on every backend.
        x = images.reshape(batch, height // size, size, width // size, size, channels)
        x = x.swapaxes(2, 3).reshape(-1, size * size * channels)
        x = x.astype(self.dtype) @ kernel.astype(self.dtype).reshape(-1, self.width)
        if self.use_bias:
            initial = self.initial.patch_bias(size * size * channels)
            bias = self.param("bias", initial, (self.width,))
            x = x + bias.astype(self.dtype)[None]
        return x.reshape(batch, -1, self.width)


class Linear(nn.Module):
    """A linear layer [..., D'] -> [..., D] in `dtype`, or from it to float32 with `float32_sums`.

    The output may be multiplied by a gain [D]: multiplied into kernel and bias, which gives the
    same values. The gain's gradient then is a sum over D' numbers of the kernel's, not over every
    token, whose output before the gain need not be kept for it either.
    """

    features: int  # D
    kernel_init: Initializer
    bias_init: Initializer | None = initializers.zeros  # None: no bias
    dtype: jnp.dtype = jnp.float32
    float32_sums: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        if gain is not None:
            kernel = kernel * gain[None]
        # All tokens in one axis: with more, XLA's CPU transposes copies for the kernel's gradient.
        tokens = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        multiply = float32_product if self.float32_sums else jnp.matmul
        y = multiply(tokens, kernel.astype(self.dtype))
        if self.bias_init is not None:
            bias = self.param("bias", self.bias_init, (self.features,))
            bias = bias if gain is None else bias * gain
            y = y + bias.astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)


def at_tokens(x: jax.Array, tokens: jax.Array | None) -> jax.Array:
    """Some of each image's tokens: x [B, L, ...], int32 [B, R] or None for all -> [B, R, ...]."""
    return x if tokens is None else jax.vmap(lambda row, wanted: row[wanted])(x, tokens)


class Attention(nn.Module):
    """Multi-head self-attention; by default with biases on queries and values, none on keys.

    x [B, L, D], bias float32 [heads, N, N] or None, gain [D] of the output or None, `tokens` as in
    `Block` -> [B, R, D]. Tokens behind the first N are padding. `relative_grid` adds a table of
    this layer's own, `qkv_bias` is one of QKV_BIASES. Queries are scaled before the product, the
    bias is added unscaled. Source: beit/modeling_finetune.py, lines 78-142.
    """

    heads: int
    relative_grid: tuple[int, int] | None = None
    output_scale: float = 1.0  # of the output projection's initial weights
    initial: Init = MIM_INIT
    qkv_bias: str = "qv"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        gain: jax.Array | None = None,
        tokens: jax.Array | None = None,
    ) -> jax.Array:
        batch, length, width = x.shape
        qkv = Linear(
            3 * width,
            self.initial.weight,
            initializers.zeros if self.qkv_bias == "qkv" else None,
            dtype=self.dtype,
            name="qkv",
        )(x)
        if self.qkv_bias == "qv":
            q_bias = self.param("q_bias", initializers.zeros, (width,))
            v_bias = self.param("v_bias", initializers.zeros, (width,))
            qkv_bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(self.dtype)
            qkv = qkv + qkv_bias[None, None]
        if self.relative_grid is not None:
            name = "relative_position_bias"
            own = RelativePositionBias(self.relative_grid, self.heads, name=name)()
            bias = own if bias is None else bias + own
        x = attend(qkv.reshape(batch, length, 3, self.heads, -1), bias)
        x = at_tokens(x.reshape(batch, length, width), tokens)
        out = scaled(self.initial.weight, self.output_scale)
        return Linear(width, out, self.initial.bias(width), dtype=self.dtype, name="proj")(x, gain)


class Mlp(nn.Module):
    """Two linear layers with one of ACTIVATIONS between: [..., D], gain [D] or None -> [..., D]."""

    hidden: int
    output_scale: float = 1.0  # of the second layer's initial weights
    initial: Init = MIM_INIT
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
        width, weight, bias = x.shape[-1], self.initial.weight, self.initial.bias
        y = Linear(self.hidden, weight, bias(width), dtype=self.dtype, name="fc1")(x)
        y = ACTIVATIONS[self.activation](y)
        return Linear(
            width,
            scaled(weight, self.output_scale),
            bias(self.hidden),
            dtype=self.dtype,
            name="fc2",
        )(y, gain)


def drop_path(keys: jax.Array, rate: float) -> jax.Array:
    """Stochastic depth's factors for a block's two branches: float32 [B, 2], 0 or 1 / (1 - rate).

    Row b is drawn from keys[b] alone, so neither the batch's size nor its sharding changes it.
    Source: Huang et al. 2016, with the inverse scaling of timm's `drop_path`.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (2,)))(keys)
    return keep / (1 - rate)


class Block(nn.Module):
    """A pre-norm block: x += s1 * gamma_1 * attn(norm1(x)); x += s2 * gamma_2 * mlp(norm2(x)).

    x [B, L, D], bias as in `Attention`, keys [B] or None -> [B, L, D]; of `tokens` int32 [B, R]
    alone, if they are given: [B, R, D], after which the MLP is spared the others. The factors s are
    those of `drop_path` with keys, else 1; gamma (LayerScale) exists where `layer_scale` is above
    0. Source: beit/modeling_finetune.py, lines 169-182.
    """

    heads: int
    mlp_ratio: float = 4.0
    layer_scale: float = 0.0
    drop_path: float = 0.0
    relative_grid: tuple[int, int] | None = None
    output_scale: float = 1.0
    initial: Init = MIM_INIT
    qkv_bias: str = "qv"
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        keys: jax.Array | None = None,
        tokens: jax.Array | None = None,
    ) -> jax.Array:
        width = x.shape[-1]
        shared = {"output_scale": self.output_scale, "initial": self.initial, "dtype": self.dtype}
        attn = Attention(
            self.heads,
            relative_grid=self.relative_grid,
            qkv_bias=self.qkv_bias,
            name="attn",
            **shared,
        )
        hidden = round(width * self.mlp_ratio)
        mlp = Mlp(hidden, activation=self.activation, name="mlp", **shared)
        norm = partial(LayerNorm, epsilon=self.norm_epsilon, dtype=self.dtype)
        factors = None if keys is None or self.drop_path == 0 else drop_path(keys, self.drop_path)
        gamma_1, gamma_2 = self._gain(1, width), self._gain(2, width)
        y = attn(norm(name="norm1")(x), bias, gamma_1, tokens)
        x = at_tokens(x, tokens) + _drop(y, factors, 0)
        return x + _drop(mlp(norm(name="norm2")(x), gamma_2), factors, 1)

    def _gain(self, number: int, width: int) -> jax.Array | None:
        if self.layer_scale == 0:
            return None
        return self.param(f"gamma_{number}", initializers.constant(self.layer_scale), (width,))


def _drop(branch: jax.Array, factors: jax.Array | None, number: int) -> jax.Array:
    """A branch [B, L, D] times its column of the factors [B, 2]."""
    if factors is None:
        return branch
    return branch * factors[:, number, None, None].astype(branch.dtype)
