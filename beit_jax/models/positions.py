"""The relative position bias of attention: a learned number for every offset of two tokens."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers


def relative_position_rows(grid: tuple[int, int]) -> int:
    """Rows of a relative position table: one per offset of two patches, and three for CLS."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_position_index(grid: tuple[int, int]) -> jax.Array:
    """Which row of the table belongs to each pair of tokens: int32 [L, L], query first.

    Patches at an offset (query minus key) of (r, c) share row (r + h-1) * (2w-1) + (c + w-1). The
    last three rows are CLS to patch, patch to CLS, and CLS to itself.
    Source: beit/modeling_finetune.py, lines 94-110, here for any grid.
    """
    height, width = grid
    position = jnp.arange(height * width, dtype=jnp.int32)
    row, column = position // width, position % width
    row = row[:, None] - row[None, :] + height - 1
    column = column[:, None] - column[None, :] + width - 1
    index = jnp.pad(row * (2 * width - 1) + column, ((1, 0), (1, 0)))
    rows = relative_position_rows(grid)
    # The corner belongs to all three, so it is written last.
    return index.at[0, :].set(rows - 3).at[:, 0].set(rows - 2).at[0, 0].set(rows - 1)


class RelativePositionBias(nn.Module):
    """A learned bias per head and relative position: () -> float32 [heads, L, L], zero at first."""

    grid: tuple[int, int]
    heads: int

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (relative_position_rows(self.grid), self.heads)
        table = self.param("table", initializers.zeros, shape)
        bias = jnp.asarray(table)[relative_position_index(self.grid)]
        return jnp.moveaxis(bias, -1, 0)
