"""The vision transformer that every stage shares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from beit_jax.errors import UserError
from beit_jax.models.layers import (
    MIM_INIT,
    QKV_BIASES,
    Block,
    Init,
    LayerNorm,
    PatchEmbed,
)
from beit_jax.models.ops import ACTIVATIONS, fuses
from beit_jax.models.positions import RelativePositionBias

POSITIONS = (
    "absolute",
    "relative",
    "shared_relative",
    "absolute+relative",
    "absolute+shared_relative",
)


class Encoded(NamedTuple):
    """What the transformer gives."""

    states: tuple[jax.Array, ...]  # [B, L, D] after every block, CLS first; the last of `read`
    bias: jax.Array | None  # float32 [heads, L, L], the relative position bias that blocks share
    embedded: jax.Array  # [B, L, D] before the first block


class ViT(nn.Module):
    """Patch embedding, CLS token, positions and blocks; no final norm, no head.

    `positions` says where tokens stand: a learned embedding ("absolute"), a relative position bias
    of every block's own ("relative") or one for all ("shared_relative"). Stochastic depth rises
    linearly over the blocks from 0 to `drop_path`. The initial output projections of block
    l = 1, 2, ... are divided by sqrt(2 l). Source: beit/modeling_pretrain.py, lines 70-135. The
    other fields describe the towers that teach BEiT v2: CLIP and DINO.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    positions: str = "shared_relative"
    layer_scale: float = 0.1  # initial value; 0: none
    drop_path: float = 0.0
    qkv_bias: str = "qv"  # which of queries, keys and values have a bias
    activation: str = "gelu"
    norm_epsilon: float = 1e-6  # added to the variance by every LayerNorm
    norm_pre: bool = False  # a LayerNorm before the first block
    patch_bias: bool = True
    initial: Init = MIM_INIT
    dtype: jnp.dtype = jnp.float32
    remat: bool = False  # recompute each block in the backward pass

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        mask: jax.Array | None = None,
        keys: jax.Array | None = None,
        read: jax.Array | None = None,
    ) -> Encoded:
        """Returns the state after every block.

        Args:
          images: [B, H, W, ch], normalised; H and W are multiples of the patch size.
          mask: bool [B, N]; where true, the patch is replaced by the learned mask token, which
            exists as a parameter only in a model that is initialised with a mask.
          keys: [B] random keys switch stochastic depth on; row b's draws depend on keys[b] alone.
          read: int32 [B, R], the tokens whose last state is wanted, CLS being 0: [B, R, D]. What
            the last block would compute for the others alone is left out. None: all, [B, L, D].

        Raises:
          UserError: for a field of an unknown value, a width that the heads do not divide, and
            images that are not a whole number of patches.
        """
        self._check()
        size = self.patch_size
        grid = (images.shape[1] // size, images.shape[2] // size)
        embed = PatchEmbed(
            size, self.width, self.initial, self.patch_bias, self.dtype, name="patch_embed"
        )
        x = self._tokens(embed(images), mask)
        if self.norm_pre:
            x = LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name="norm_pre")(x)
        length, embedded, bias = x.shape[1], x, None
        if "shared_relative" in self.positions.split("+"):
            bias = RelativePositionBias(grid, self.heads, name="relative_position_bias")()
        if self.positions != "absolute" and fuses(self.dtype, self.width // self.heads):
            x = jnp.pad(x, ((0, 0), (0, length % 2), (0, 0)))  # once, rather than in every block
        states = []
        for i in range(self.depth):
            drop = self.drop_path * i / max(self.depth - 1, 1)
            block = make_block(self, i, grid, drop, self.initial, f"block_{i}")
            tokens = read if i == self.depth - 1 else None
            x = block(x, bias, block_keys(keys, i), tokens)
            states.append(x[:, :length] if tokens is None else x)
        return Encoded(tuple(states), bias, embedded)

    def _tokens(self, patches: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Puts mask tokens in, CLS before and absolute positions on: [B, N, D] -> [B, L, D]."""
        batch, count, width = patches.shape
        if mask is not None:
            token = self.param("mask_token", self.initial.weight, (1, 1, width))
            patches = jnp.where(mask[:, :, None], token.astype(self.dtype), patches)
        cls_token = self.param("cls_token", self.initial.weight, (1, 1, width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (batch, 1, width)), patches], axis=1)
        if "absolute" in self.positions.split("+"):
            embedding = self.param("pos_embed", self.initial.weight, (1, count + 1, width))
            x = x + embedding.astype(self.dtype)
        return x

    def _check(self) -> None:
        for key, known in (
            ("positions", POSITIONS),
            ("qkv_bias", QKV_BIASES),
            ("activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, key) not in known:
                raise UserError(
                    f"config.model.{key} is {getattr(self, key)!r}: choose one of "
                    f"{', '.join(known)}"
                )
        if self.width % self.heads:
            raise UserError(
                f"config.model.heads of {self.heads} does not divide config.model.width of "
                f"{self.width}: change one of them"
            )


def make_block(
    vit: ViT, number: int, grid: tuple[int, int], drop_path: float, initial: Init, name: str
) -> Block:
    """A block like those of `vit`, initialised as number 0, 1, ... from the input."""
    block_class = nn.remat(Block) if vit.remat else Block
    return block_class(
        vit.heads,
        mlp_ratio=vit.mlp_ratio,
        layer_scale=vit.layer_scale,
        drop_path=drop_path,
        relative_grid=grid if "relative" in vit.positions.split("+") else None,
        output_scale=(2 * (number + 1)) ** -0.5,
        initial=initial,
        qkv_bias=vit.qkv_bias,
        activation=vit.activation,
        norm_epsilon=vit.norm_epsilon,
        dtype=vit.dtype,
        name=name,
    )


def block_keys(keys: jax.Array | None, number: int) -> jax.Array | None:
    """The rows' keys [B] of one block, or None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
