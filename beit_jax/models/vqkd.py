"""BEiT v2's tokenizer: a codebook between two transformers that imitates a teacher's features.

Source: BEiT v2 (Peng et al. 2022), section 2.2, and beit2/modeling_vqkd.py.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from beit_jax.models import quantizer
from beit_jax.models.layers import LayerNorm, Linear
from beit_jax.models.vit import ViT


def map_pixels(pixels: jax.Array) -> jax.Array:
    """[0, 1] to [-1, 1], which the tokenizer takes."""
    return 2 * pixels - 1


class Imitation(NamedTuple):
    """What training needs."""

    z: jax.Array  # float32 [B, h, w, E], the encoder's codes before normalisation
    quantized: quantizer.Quantized  # of z
    features: jax.Array  # float32 [B, N, T], the teacher's as the decoder guesses them


class VQKD(nn.Module):
    """Images to a grid of codes, and codes to a teacher's features of the patches.

    The codes are collection "codebook": "vectors" [K, E] on the unit sphere and "usage" [K], the
    moving average of how often each was chosen. `quantizer.follow` moves them; nothing here does.
    """

    encoder: ViT
    decoder: ViT  # of patch size 1: it reads a grid of codes as an image
    codes: int  # K
    code_width: int  # E
    teacher_width: int  # T

    def setup(self):
        vit = self.encoder
        norm = dict(epsilon=vit.norm_epsilon, dtype=vit.dtype)
        dense = partial(Linear, kernel_init=vit.initial.weight, dtype=vit.dtype)
        # Full float32 on every backend: tokens must not hang on rounding.
        exact = partial(
            nn.Dense,
            kernel_init=vit.initial.weight,
            dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
        )
        self.encoder_norm = LayerNorm(**norm)
        self.to_code_1 = exact(vit.width)
        self.to_code_2 = exact(self.code_width)
        self.decoder_norm = LayerNorm(**norm)
        self.to_teacher_1 = dense(self.decoder.width)
        self.to_teacher_2 = dense(self.teacher_width, float32_sums=True)
        shape = (self.codes, self.code_width)
        self.vectors = self.variable(
            "codebook",
            "vectors",
            lambda: quantizer.normalize(initializers.normal(1)(self.make_rng("params"), shape)),
        )
        self.usage = self.variable("codebook", "usage", jnp.zeros, (self.codes,))

    def encode(self, pixels: jax.Array, read: jax.Array | None = None) -> jax.Array:
        """Pixels [B, H, W, ch] in [-1, 1] -> codes before normalisation float32 [B, h, w, E].

        Those of the patches `read` alone, int32 [B, M] in the row-major grid, are [B, M, E].
        """
        if read is None:
            x = self.encoder(pixels).states[-1][:, 1:]
        else:
            x = self.encoder(pixels, read=read + 1).states[-1]
        x = self.to_code_2(nn.tanh(self.to_code_1(self.encoder_norm(x))))
        if read is not None:
            return x
        (batch, height, width, _), size = pixels.shape, self.encoder.patch_size
        return x.reshape(batch, height // size, width // size, self.code_width)

    def tokens(self, pixels: jax.Array, read: jax.Array | None = None) -> jax.Array:
        """Pixels [B, H, W, ch] in [-1, 1] -> the nearest codes int32 [B, h, w], or [B, M]."""
        return quantizer.quantize(self.encode(pixels, read), self.vectors.value).tokens

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes float32 [B, h, w, E] on the unit sphere -> features float32 [B, N, T]."""
        x = self.decoder_norm(self.decoder(codes).states[-1][:, 1:])
        return self.to_teacher_2(nn.tanh(self.to_teacher_1(x)))

    def __call__(self, pixels: jax.Array) -> Imitation:
        """Pixels [B, H, W, ch] in [-1, 1] -> what training needs."""
        z = self.encode(pixels)
        quantized = quantizer.quantize(z, self.vectors.value)
        return Imitation(z, quantized, self.decode(quantized.codes))
