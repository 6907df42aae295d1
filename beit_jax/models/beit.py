"""BEiT's two models on one encoder: masked image modelling and classification."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from beit_jax.errors import UserError
from beit_jax.models.layers import LayerNorm, float32_sums, scaled
from beit_jax.models.vit import ViT


class MaskedImageModel(nn.Module):
    """Predicts the visual tokens of masked patches.

    Source: BEiT (Bao et al. 2021), section 2.3; beit/modeling_pretrain.py, lines 100-135.
    """

    encoder: ViT
    vocabulary: int

    @nn.compact
    def __call__(
        self, images: jax.Array, indices: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """Returns logits over the codes, float32 [B, M, K], in the order of `indices`.

        Args:
          images: [B, H, W, ch], normalised.
          indices: int32 [B, M], the masked patches of each image in the row-major grid.
          keys: [B] random keys for stochastic depth in training, None otherwise.
        """
        size, dtype = self.encoder.patch_size, self.encoder.dtype
        patches = jnp.arange((images.shape[1] // size) * (images.shape[2] // size))
        mask = (indices[:, :, None] == patches[None, None, :]).any(axis=1)
        x = self.encoder(images, mask, keys)[-1]
        # Norm and head treat every token alike, so only the masked ones go through them.
        x = jnp.take_along_axis(x, indices[:, :, None] + 1, axis=1)
        x = LayerNorm(dtype=dtype, name="norm")(x)
        weight = self.encoder.initial.weight
        return _head(self.vocabulary, dtype=dtype, kernel_init=weight, name="lm_head")(x)


class Classifier(nn.Module):
    """Logits over the classes, from the mean of the patches ("mean") or from CLS ("cls").

    Source: beit/modeling_finetune.py, lines 285-287 and 347-352.
    """

    encoder: ViT
    classes: int
    pooling: str = "mean"
    head_scale: float = 1.0  # factor on the head's initial weights

    @nn.compact
    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """images [B, H, W, ch], normalised, keys [B] or None -> float32 [B, C]."""
        dtype = self.encoder.dtype
        x = self.encoder(images, keys=keys)[-1]
        if self.pooling == "mean":
            x = x[:, 1:].mean(axis=1, dtype=jnp.float32)
            x = LayerNorm(dtype=dtype, name="fc_norm")(x)
        elif self.pooling == "cls":
            x = LayerNorm(dtype=dtype, name="norm")(x[:, 0])
        else:
            raise UserError(
                f"config.model.pooling is {self.pooling!r}: choose mean (of the patches) or cls"
            )
        weight = scaled(self.encoder.initial.weight, self.head_scale)
        return _head(self.classes, dtype=dtype, kernel_init=weight, name="head")(x)


# Logits are summed and kept in float32: bfloat16 cannot tell close ones of 8,192 codes apart.
_head = partial(nn.Dense, dot_general=float32_sums)
