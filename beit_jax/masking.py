"""Which patches are masked: blockwise (BEiT, Algorithm 1) or uniformly random, on the device.

Everything is a pure function of a key with a fixed amount of work, so it can be jitted and vmapped
over a batch of keys. Official: `MaskingGenerator` in masking_generator.py of BEiT and BEiT v2.
"""

import math

import jax
import jax.numpy as jnp

from beit_jax.errors import UserError

_ATTEMPTS = 10  # candidates for one block, as in the official code
_WORD = 32  # columns of the grid in one unsigned integer; a row of the grid is one or more words


def blockwise_mask(
    key: jax.Array,
    grid: tuple[int, int],
    num_masked: int,
    *,
    min_block: int,
    aspect: float = 0.3,
    exact: bool = True,
) -> jax.Array:
    """Masks rectangles of patches until `num_masked` patches are masked.

    A block has an area drawn from U(min_block, patches still wanted) and a log-uniform aspect ratio
    in [aspect, 1 / aspect], is smaller than the grid in both directions, and is accepted if it
    masks at least one new patch and at most those still wanted. When ten candidates in a row are
    refused, the official v1 code stops below `num_masked`; v2 tops up with single patches.

    The ten candidates for a block are drawn at once and the first acceptable one is taken: the mask
    changes on acceptance only, so this is the sequential algorithm. How many blocks an image needs
    varies, and a loop that waits for the slowest image would wait on the host each turn, so the
    loop has the fixed length of `_num_blocks`.

    Args:
      key: a PRNG key.
      grid: (h, w) patches.
      num_masked: M, the number of patches to mask.
      min_block: smallest area drawn for a block, in patches.
      aspect: least aspect ratio (height over width) of a block; the largest is its inverse.
      exact: top up with uniformly random unmasked patches to exactly M, as v2 does. False leaves
        at most M, as v1 does.

    Returns:
      bool [h, w], True where masked.
    """
    key_blocks, key_fill = jax.random.split(key)
    draws = _draw_candidates(key_blocks, _num_blocks(grid, num_masked), aspect)
    mask, wanted = _place_blocks(draws, grid, num_masked, min_block)
    if exact:
        flat = mask.reshape(-1)
        scores = jnp.where(flat, 0, _unique_scores(key_fill, flat.size))
        mask = (flat | _highest(scores, wanted)).reshape(grid)
    return mask


def random_mask(key: jax.Array, grid: tuple[int, int], num_masked: int) -> jax.Array:
    """Masks exactly `num_masked` patches, every choice equally likely: bool [h, w]."""
    scores = _unique_scores(key, grid[0] * grid[1])
    return _highest(scores, jnp.int32(num_masked)).reshape(grid)


def masked_indices(mask: jax.Array, num_masked: int) -> jax.Array:
    """Positions of the masked patches in row-major order, ascending: int32 [M].

    Args:
      mask: bool [h, w] with exactly `num_masked` True values.
      num_masked: M. Of a mask with more the first M are returned; one with fewer repeats position
        0, which is why both generators above return exactly M.
    """
    return jnp.nonzero(mask.reshape(-1), size=num_masked)[0].astype(jnp.int32)


def num_masked_patches(
    share: float, grid: tuple[int, int], *, kind: str, min_block: int, aspect: float = 0.3
) -> int:
    """M: `share` of the grid's patches, rounded; refuses what cannot be masked.

    Raises:
      UserError: nothing or more than everything to mask, an unknown kind, or blocks that do not fit
        into the grid or into M; names the key to change.
    """
    height, width = grid
    patches = height * width
    if kind not in ("blockwise", "random"):
        raise UserError(f"config.mask.kind is {kind!r}: set it to blockwise or random.")
    num_masked = round(share * patches) if 0 <= share <= 1 else -1
    if not 0 < num_masked <= patches:
        raise UserError(
            f"config.mask.share is {share}, which is not between 1 and all of the {patches} patches"
            f" of a {height} by {width} grid: set a share from {1 / patches:.2g} to 1."
        )
    if kind == "random":
        return num_masked
    if not 1 <= min_block <= num_masked:
        raise UserError(
            f"config.mask.min_block is {min_block} but {num_masked} patches are masked: set it "
            f"from 1 to {num_masked}, or change config.mask.share."
        )
    if not 0.0 < aspect <= 1.0:
        raise UserError(f"config.mask.aspect is {aspect}: set a ratio above 0 and at most 1.")
    if not _fits(min_block, grid, aspect):
        raise UserError(
            f"No block of config.mask.min_block={min_block} patches fits into a {height} by "
            f"{width} grid: lower it, or set config.mask.kind=random."
        )
    return num_masked


def _draw_candidates(key: jax.Array, num_blocks: int, aspect: float) -> tuple[jax.Array, ...]:
    """What chance decides about ten candidates for each block, four float arrays [blocks, 10].

    Uniform draws for area, row and column, and the square root of the aspect ratio.
    """
    # Drawn flat: a threefry draw of three short axes is ten times as slow on a CPU.
    draws = jax.random.uniform(key, (4 * num_blocks * _ATTEMPTS,))
    area, stretch, row, column = draws.reshape(4, num_blocks, _ATTEMPTS)
    return area, jnp.exp(math.log(aspect) * (stretch - 0.5)), row, column


def _place_blocks(
    draws: tuple[jax.Array, ...], grid: tuple[int, int], num_masked: int, min_block: int
) -> tuple[jax.Array, jax.Array]:
    """Adds one block per turn until none of ten candidates is acceptable.

    Returns bool [h, w] and how many of the M patches are still wanted. The grid is held as one bit
    a patch: counting and covering take a few operations a row.
    """

    def add_block(state: tuple, draw: tuple) -> tuple:
        free, wanted, alive = state
        blocks = _candidates(draw, wanted, grid, min_block)
        new = jnp.sum(jax.lax.population_count(blocks & free[None]), axis=(1, 2), dtype=jnp.int32)
        acceptable = (new > 0) & (new <= wanted) & alive
        first = jnp.argmax(acceptable)
        found = acceptable[first]
        free = jnp.where(found, free & ~blocks[first], free)
        return (free, wanted - jnp.where(found, new[first], 0), found), None

    start = (_all_free(grid), jnp.int32(num_masked), jnp.array(True))
    (free, wanted, _), _ = jax.lax.scan(add_block, start, draws)
    return ~_unpack(free, grid), wanted


def _candidates(
    draw: tuple[jax.Array, ...], wanted: jax.Array, grid: tuple[int, int], min_block: int
) -> jax.Array:
    """Ten rectangles as bit masks, uint32 [10, words, h]; one too large for the grid is empty."""
    area, stretch, row, column = draw
    # The bounds are reversed where fewer than min_block patches are wanted, as in the original.
    side = jnp.sqrt(min_block + (wanted - min_block) * area)
    tall, wide = jnp.round(side * stretch), jnp.round(side / stretch)
    fits = (tall < grid[0]) & (wide < grid[1])
    top = jnp.floor(row * (grid[0] - tall + 1))
    left = jnp.floor(column * (grid[1] - wide + 1))
    rows = jnp.arange(grid[0], dtype=jnp.float32)[None, :]
    rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None]) & fits[:, None]
    columns = _columns_below(left + wide, grid) & ~_columns_below(left, grid)
    return jnp.where(rows[:, None, :], columns[:, :, None], 0)


def _columns_below(limit: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Bits of the columns below each limit [n], float and at least 0: uint32 [n, words]."""
    first = _WORD * jnp.arange(-(-grid[1] // _WORD), dtype=jnp.float32)
    bits = jnp.clip(limit[:, None] - first[None, :], 0, _WORD).astype(jnp.uint32)
    # A shift by a whole word is not defined everywhere.
    return jnp.where(bits < _WORD, (jnp.uint32(1) << (bits % _WORD)) - 1, jnp.uint32(2**32 - 1))


def _all_free(grid: tuple[int, int]) -> jax.Array:
    """A set bit for every patch: uint32 [words, h]."""
    row = _columns_below(jnp.full((1,), grid[1], jnp.float32), grid).T
    return jnp.broadcast_to(row, (row.shape[0], grid[0]))


def _unpack(words: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """From bits to bool: uint32 [words, h] -> [h, w]."""
    bits = words.T[:, :, None] >> jnp.arange(_WORD, dtype=jnp.uint32)[None, None, :]
    return (bits & 1).reshape(grid[0], -1)[:, : grid[1]] == 1


def _unique_scores(key: jax.Array, patches: int) -> jax.Array:
    """Random numbers from 1 to below 2**31, all different: uint32 [N]."""
    position_bits = patches.bit_length()
    chance = jax.random.bits(key, (patches,)) >> (1 + position_bits) << position_bits
    return chance | jnp.arange(1, patches + 1, dtype=jnp.uint32)


def _highest(scores: jax.Array, count: jax.Array) -> jax.Array:
    """True at exactly the `count` highest of `scores` [N], which differ where they are not 0.

    Finds the least score that is taken bit by bit, which is several times as fast as sorting on a
    CPU and takes a count that differs between images.
    """

    def refine(least: jax.Array, bit: jax.Array) -> tuple[jax.Array, None]:
        trial = least | bit
        return jnp.where(jnp.sum(scores >= trial) >= count, trial, least), None

    bits = jnp.uint32(1) << jnp.arange(31, -1, -1, dtype=jnp.uint32)
    least, _ = jax.lax.scan(refine, jnp.uint32(0), bits)
    return scores >= least


def _num_blocks(grid: tuple[int, int], num_masked: int) -> int:
    """Turns of the loop over blocks: each adds at least one patch, so M are always enough.

    Far fewer are needed: a block takes about half of what is still wanted, and is harder to find
    the fuller the grid is. The bound lies above the 99.9th percentile measured for minimum blocks
    of at least 4 on grids from 4x8 to 40x40 and shares from 0.38 to 0.95 (14x14 with M = 75: mean
    4.5, bound 12); with a minimum block of 1 it cuts one draw in 200. What a cut leaves
    is a few patches, which topping up adds where exactly M are asked for.
    """
    patches = grid[0] * grid[1]
    crowding = math.sqrt(patches / max(patches - num_masked, 1))
    return min(num_masked, math.ceil(1.5 * math.log2(num_masked + 1) * crowding))


def _fits(area: int, grid: tuple[int, int], aspect: float) -> bool:
    """Whether a block of `area` is below the grid's size in both directions for some aspect."""
    # Sides are rounded (half to even) and must then be below the grid's, so at most size - 0.5.
    tallest, widest = grid[0] - 0.5, grid[1] - 0.5
    lowest = max(aspect, area / widest**2)
    highest = min(1.0 / aspect, tallest**2 / area)
    return min(grid) > 1 and lowest < highest
