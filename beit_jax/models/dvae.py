"""The discrete VAE of DALL-E: images to a grid of codes and back.

Source: openai/DALL-E, dall_e/encoder.py, decoder.py and utils.py. Published sizes: 4 groups of 2
blocks, width 256, vocabulary 8192, decoder input 128, 3 channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from beit_jax.errors import UserError
from beit_jax.models.layers import at_tokens
from beit_jax.models.ops import exact_product

MARGIN = 0.1  # of the mapped range, at both ends: the logit-Laplace density lives inside (0, 1)


def map_pixels(pixels: jax.Array) -> jax.Array:
    """[0, 1] to [0.1, 0.9], the range that the logit-Laplace likelihood models."""
    return (1 - 2 * MARGIN) * pixels + MARGIN


def unmap_pixels(mapped: jax.Array) -> jax.Array:
    """[0.1, 0.9] back to [0, 1]; what lies outside is clipped."""
    return jnp.clip((mapped - MARGIN) / (1 - 2 * MARGIN), 0, 1)


def mean_pixels(statistics: jax.Array) -> jax.Array:
    """The picture [..., ch] in [0, 1] of a decoder's statistics [..., 2 * ch]: their locations."""
    locations, _ = jnp.split(statistics, 2, axis=-1)
    return unmap_pixels(nn.sigmoid(locations))


KERNEL_INIT = initializers.variance_scaling(1.0, "fan_in", "normal")  # N(0, 1 / fan_in)
Conv = partial(nn.Conv, kernel_init=KERNEL_INIT)  # SAME zero padding, biases 0


def _by_rows(x, kernel, strides, padding, **options):
    """`jax.lax.conv_general_dilated` of stride 1 as one over rows alone, with columns as channels.

    The same sums: a GPU is five times as slow with three channels.
    """
    height, width, channels, features = kernel.shape
    columns = jnp.pad(x, ((0, 0), (0, 0), ((width - 1) // 2, width // 2), (0, 0)))
    x = jnp.concatenate([columns[:, :, i : i + x.shape[2]] for i in range(width)], axis=-1)
    kernel = kernel.reshape(height, 1, width * channels, features)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


class ResidualBlock(nn.Module):
    """x + gain * four convolutions, each after a ReLU: [B, h, w, c] -> [B, h, w, features].

    The hidden width is a quarter of `features`; a 1x1 convolution fits x where the width changes.
    """

    features: int
    kernels: tuple[int, int, int, int]
    gain: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.features // 4
        y = x
        for i, size in enumerate(self.kernels):
            features = self.features if i == 3 else hidden
            conv = Conv(features, (size, size), dtype=self.dtype, name=f"conv_{i + 1}")
            y = conv(nn.relu(y))
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1), dtype=self.dtype, name="id_path")(x)
        return x + self.gain * y


def _gain(groups: int, blocks_per_group: int) -> float:
    """OpenAI's 1 / layers^2, which is 1/64 for the published 4 groups of 2 blocks."""
    return (groups * blocks_per_group) ** -2


class Encoder(nn.Module):
    """mapped pixels [B, H, W, ch] -> logits float32 [B, h, w, K], with h = H / 2^(groups - 1).

    Those of `read` alone, int32 [B, M] positions in the row-major grid, are [B, M, K]. Group
    i = 0, 1, ... is `width` * 2^i wide and ends, but for the last, in a 2x2 max-pool.
    """

    vocabulary: int
    width: int = 256
    groups: int = 4
    blocks_per_group: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, read: jax.Array | None = None) -> jax.Array:
        factor = 2 ** (self.groups - 1)
        if pixels.shape[1] % factor or pixels.shape[2] % factor:
            raise UserError(
                f"the tokenizer's images of {pixels.shape[1]}x{pixels.shape[2]} pixels are not a "
                f"multiple of {factor}: change config.data.image_size or config.dvae.groups, whose "
                f"{self.groups} groups shrink images {factor} times"
            )
        gain = _gain(self.groups, self.blocks_per_group)
        options = {"dtype": self.dtype, "conv_general_dilated": _by_rows}
        x = Conv(self.width, (7, 7), **options, name="input")(pixels)
        for group in range(self.groups):
            features = self.width * 2**group
            for block in range(self.blocks_per_group):
                name = f"group_{group + 1}_block_{block + 1}"
                x = ResidualBlock(features, (3, 3, 3, 1), gain, self.dtype, name=name)(x)
            if group < self.groups - 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        if read is not None:
            x = at_tokens(x.reshape(len(x), -1, x.shape[-1]), read)
        return _Logits(self.vocabulary, name="output")(nn.relu(x))


class _Logits(nn.Module):
    """A 1x1 convolution to float32: which code is largest must not hang on rounded weights."""

    vocabulary: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, 1, x.shape[-1], self.vocabulary)
        kernel = self.param("kernel", KERNEL_INIT, shape)
        bias = self.param("bias", initializers.zeros, (self.vocabulary,))
        y = exact_product(x.reshape(-1, x.shape[-1]), kernel[0, 0]) + bias[None]
        return y.reshape(*x.shape[:-1], self.vocabulary)


class Decoder(nn.Module):
    """codes [B, h, w, K] -> statistics float32 [B, H, W, 2 * channels].

    H is h * 2^(groups - 1). Codes are one-hot or soft (they sum to 1). The statistics are location
    and log-scale of each pixel value's logit-Laplace distribution, all locations first. Group
    i = 0, 1, ... is `width` * 2^(groups - 1 - i) wide and ends, but for the last, in a nearest 2x
    upsampling.
    """

    vocabulary: int
    width: int = 256
    groups: int = 4
    blocks_per_group: int = 2
    channels: int = 3
    decoder_input: int = 128  # features after the first convolution
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        if codes.shape[-1] != self.vocabulary:
            raise ValueError(f"{codes.shape[-1]} codes, but a vocabulary of {self.vocabulary}")
        gain = _gain(self.groups, self.blocks_per_group)
        x = Conv(self.decoder_input, (1, 1), name="input")(codes.astype(jnp.float32))
        x = x.astype(self.dtype)
        for group in range(self.groups):
            features = self.width * 2 ** (self.groups - 1 - group)
            for block in range(self.blocks_per_group):
                name = f"group_{group + 1}_block_{block + 1}"
                x = ResidualBlock(features, (1, 3, 3, 3), gain, self.dtype, name=name)(x)
            if group < self.groups - 1:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = Conv(2 * self.channels, (1, 1), dtype=self.dtype, name="output")(nn.relu(x))
        return x.astype(jnp.float32)


class DVAE(nn.Module):
    """Encoder and decoder over one vocabulary; see there for the fields."""

    vocabulary: int
    width: int = 256
    groups: int = 4
    blocks_per_group: int = 2
    channels: int = 3
    decoder_input: int = 128
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shared = (self.vocabulary, self.width, self.groups, self.blocks_per_group)
        self.encoder = Encoder(*shared, dtype=self.dtype)
        self.decoder = Decoder(*shared, self.channels, self.decoder_input, dtype=self.dtype)

    def encode(self, pixels: jax.Array, read: jax.Array | None = None) -> jax.Array:
        """As `Encoder`: the argmax of the logits is the token."""
        return self.encoder(pixels, read)

    def decode(self, codes: jax.Array) -> jax.Array:
        """One-hot or soft codes [B, h, w, K] -> statistics float32 [B, H, W, 2 * channels]."""
        return self.decoder(codes)

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits and, from their softmax, statistics: touches every parameter, for `init`."""
        logits = self.encode(pixels)
        return logits, self.decode(nn.softmax(logits))
