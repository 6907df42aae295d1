"""The vision towers that teach BEiT v2's tokenizer: CLIP's and DINO's.

Sources: openai/CLIP, clip/model.py, and facebookresearch/dino, vision_transformer.py, both as
beit2/modeling_vqkd.py uses them: with the features of all patches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from beit_jax.models.layers import LayerNorm, Linear
from beit_jax.models.vit import ViT


class Features(NamedTuple):
    """What a tower sees in images, CLS first."""

    tokens: jax.Array  # float32 [B, L, D], after the final norm
    projected: jax.Array | None  # float32 [B, L, T], in the space shared with texts


class Tower(nn.Module):
    """A transformer under a norm of all its tokens and, with `projection` above 0, a projection."""

    encoder: ViT
    projection: int = 0  # T; 0: none

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        """Images [B, H, W, ch], normalised as the tower was trained, to features."""
        vit = self.encoder
        x = vit(images).states[-1]
        x = LayerNorm(epsilon=vit.norm_epsilon, dtype=vit.dtype, name="norm")(x)
        if not self.projection:
            return Features(x.astype(jnp.float32), None)
        options = {"dtype": vit.dtype, "float32_sums": True, "name": "projection"}
        dense = Linear(self.projection, vit.initial.weight, None, **options)
        return Features(x.astype(jnp.float32), dense(x))
