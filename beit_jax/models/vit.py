"""The vision transformer that every stage shares."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from beit_jax.errors import UserError
from beit_jax.models.layers import MIM_INIT, Block, Init, PatchEmbed, RelativePositionBias

POSITIONS = (
    "absolute",
    "relative",
    "shared_relative",
    "absolute+relative",
    "absolute+shared_relative",
)


class ViT(nn.Module):
    """Patch embedding, CLS token, positions and blocks; no final norm, no head.

    `positions` says where tokens stand: a learned embedding ("absolute"), a relative position bias
    of every block's own ("relative") or one for all ("shared_relative"). Stochastic depth rises
    linearly over the blocks from 0 to `drop_path`. The initial output projections of block
    l = 1, 2, ... are divided by sqrt(2 l). Source: beit/modeling_pretrain.py, lines 70-135.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    positions: str = "shared_relative"
    layer_scale: float = 0.1  # initial value; 0: none
    drop_path: float = 0.0
    initial: Init = MIM_INIT
    dtype: jnp.dtype = jnp.float32
    remat: bool = False  # recompute each block in the backward pass

    @nn.compact
    def __call__(
        self, images: jax.Array, mask: jax.Array | None = None, keys: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns the state [B, L, D] after every block, CLS first.

        Args:
          images: [B, H, W, ch], normalised; H and W are multiples of the patch size.
          mask: bool [B, N]; where true, the patch is replaced by the learned mask token, which
            exists as a parameter only in a model that is initialised with a mask.
          keys: [B] random keys switch stochastic depth on; row b's draws depend on keys[b] alone.

        Raises:
          UserError: for unknown positions, a width that the heads do not divide, and images that
            are not a whole number of patches.
        """
        self._check()
        size = self.patch_size
        grid = (images.shape[1] // size, images.shape[2] // size)
        embed = PatchEmbed(size, self.width, self.initial, self.dtype, name="patch_embed")
        x = self._tokens(embed(images), mask)
        kinds = self.positions.split("+")
        bias = None
        if "shared_relative" in kinds:
            bias = RelativePositionBias(grid, self.heads, name="relative_position_bias")()
        block_class = nn.remat(Block) if self.remat else Block
        states = []
        for i in range(self.depth):
            block = block_class(
                self.heads,
                mlp_ratio=self.mlp_ratio,
                layer_scale=self.layer_scale,
                drop_path=self.drop_path * i / max(self.depth - 1, 1),
                relative_grid=grid if "relative" in kinds else None,
                output_scale=(2 * (i + 1)) ** -0.5,
                initial=self.initial,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            block_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            x = block(x, bias, block_keys)
            states.append(x)
        return tuple(states)

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
        if self.positions not in POSITIONS:
            raise UserError(
                f"config.model.positions is {self.positions!r}: choose one of "
                f"{', '.join(POSITIONS)}"
            )
        if self.width % self.heads:
            raise UserError(
                f"config.model.heads of {self.heads} does not divide config.model.width of "
                f"{self.width}: change one of them"
            )
