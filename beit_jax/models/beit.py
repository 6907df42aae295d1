"""BEiT's two models on one encoder: masked image modelling and classification."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from beit_jax.errors import UserError
from beit_jax.models.layers import TORCH_INIT, LayerNorm, Linear, scaled
from beit_jax.models.vit import ViT, block_keys, make_block


class MaskedImageModel(nn.Module):
    """Predicts the visual tokens of masked patches.

    With `early_layers` above 0 there is a second prediction (BEiT v2): the patches as they are
    after that many blocks go, with the final CLS, through `head_layers` blocks more, so that CLS
    must carry what those patches still lack. Its norm and head are the first one's, or its own.

    Source: BEiT (Bao et al. 2021), section 2.3, and beit/modeling_pretrain.py, lines 100-135; BEiT
    v2 (Peng et al. 2022), section 2.3, and beit2/modeling_pretrain.py, lines 266-347.
    """

    encoder: ViT
    vocabulary: int
    early_layers: int = 0
    head_layers: int = 2
    shared_head: bool = True

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        indices: jax.Array,
        keys: jax.Array | None = None,
        read: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Returns logits over the codes, float32 [B, M, K]: one array, and one of the CLS branch.

        Args:
          images: [B, H, W, ch], normalised.
          indices: int32 [B, M], the masked patches of each image in the row-major grid; -1 masks
            nothing.
          keys: [B] random keys for stochastic depth in training, None otherwise.
          read: int32 [B, M], the patches whose logits are wanted; None: the masked ones, none of
            which may be -1 then.
        """
        vit, size = self.encoder, self.encoder.patch_size
        grid = (images.shape[1] // size, images.shape[2] // size)
        mask = (indices[:, :, None] == jnp.arange(grid[0] * grid[1])[None, None, :]).any(axis=1)
        read = (indices if read is None else read) + 1  # CLS is token 0
        wanted = jnp.pad(read, ((0, 0), (1, 0))) if self.early_layers else read  # CLS besides
        states, bias, _ = vit(images, mask, keys, wanted)
        norm = partial(LayerNorm, epsilon=vit.norm_epsilon, dtype=vit.dtype)
        head = partial(_head, self.vocabulary, dtype=vit.dtype, kernel_init=vit.initial.weight)
        final_norm, final_head = norm(name="norm"), head(name="lm_head")
        if not self.early_layers:
            return (final_head(final_norm(states[-1])),)
        final = final_head(final_norm(states[-1][:, 1:]))
        x = self._aggregate(states, bias, keys, grid, read)
        if self.shared_head:
            return final, final_head(final_norm(x))
        return final, head(name="cls_lm_head")(norm(name="cls_norm")(x))

    def _aggregate(self, states, bias, keys, grid, read) -> jax.Array:
        """Early patches under the final CLS, through the branch's blocks: [B, M, D] of `read`."""
        vit, early = self.encoder, self.early_layers
        if not early < vit.depth:
            raise UserError(
                f"config.model.early_layers of {early} must be below config.model.depth of "
                f"{vit.depth}: the branch starts inside the encoder"
            )
        x = jnp.concatenate([states[-1][:, :1], states[early - 1][:, 1:]], axis=1)
        steps = max(vit.depth, early + self.head_layers) - 1
        for j in range(self.head_layers):
            drop = vit.drop_path * (early + j) / max(steps, 1)
            block = make_block(vit, early + j, grid, drop, TORCH_INIT, f"cls_block_{j}")
            last = j == self.head_layers - 1
            x = block(x, bias, block_keys(keys, vit.depth + j), read if last else None)
        return x


class Classifier(nn.Module):
    """Logits over the classes, from the mean of the patches ("mean") or from CLS ("cls").

    Without classes there is no head, and the normalised vector is returned.

    Source: beit/modeling_finetune.py, lines 285-287 and 347-352.
    """

    encoder: ViT
    classes: int
    pooling: str = "mean"
    head_scale: float = 1.0  # factor on the head's initial weights

    @nn.compact
    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """images [B, H, W, ch], normalised, keys [B] or None -> float32 [B, C] or [B, D]."""
        dtype = self.encoder.dtype
        norm = partial(LayerNorm, epsilon=self.encoder.norm_epsilon, dtype=dtype)
        x = self.encoder(images, keys=keys).states[-1]
        if self.pooling == "mean":
            x = x[:, 1:].mean(axis=1, dtype=jnp.float32)
            x = norm(name="fc_norm")(x)
        elif self.pooling == "cls":
            x = norm(name="norm")(x[:, 0])
        else:
            raise UserError(
                f"config.model.pooling is {self.pooling!r}: choose mean (of the patches) or cls"
            )
        if not self.classes:
            return x.astype(jnp.float32)
        weight = scaled(self.encoder.initial.weight, self.head_scale)
        return _head(self.classes, dtype=dtype, kernel_init=weight, name="head")(x)


# Logits are summed and kept in float32: bfloat16 cannot tell close ones of 8,192 codes apart.
_head = partial(Linear, float32_sums=True)
