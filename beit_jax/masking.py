"""Which patches are masked: blockwise (BEiT, Algorithm 1) or uniformly random, on the device.

Everything is a pure function of a key with a fixed amount of work, so it can be jitted and vmapped
over a batch of keys. Official: `MaskingGenerator` in masking_generator.py of BEiT and BEiT v2.
"""

import math

import jax
import jax.numpy as jnp

from beit_jax.errors import UserError

_ATTEMPTS = 10  # candidates for one block, as in the official code
_TOGETHER = 5  # candidates of one turn, a divisor of _ATTEMPTS; the first few are mostly enough
_WORD = 16  # columns of the grid in one unsigned integer; a row of the grid is one or more words


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

    Five candidates are looked at in a turn and the first acceptable one is taken; after two turns
    without one the search is over. The mask changes on acceptance only, so this is the sequential
    algorithm. How many turns an image needs varies, and a loop that waits for the slowest image
    would wait on the host each turn, so the loop has the fixed length of `_num_turns`.

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
    turns, free = _num_turns(grid, num_masked), _all_free(grid)
    for_blocks = 4 * turns * _TOGETHER
    drawn = _draw(key, for_blocks + (_WORD * free.size if exact else 0))
    numbers = _numbers(drawn[:for_blocks].reshape(4, turns, _TOGETHER), aspect)
    free, wanted = _place_blocks(numbers, free, grid, num_masked, min_block)
    if exact:
        free = _take(free, wanted, drawn[for_blocks:], grid)
    return ~_unpack(free, grid)


def random_mask(key: jax.Array, grid: tuple[int, int], num_masked: int) -> jax.Array:
    """Masks exactly `num_masked` patches, every choice equally likely: bool [h, w].

    But for ties of the 16-bit numbers that decide: one pair in 2**16, where the later patch wins.
    """
    free = _all_free(grid)
    free = _take(free, jnp.int32(num_masked), _draw(key, _WORD * free.size), grid)
    return ~_unpack(free, grid)


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


def _draw(key: jax.Array, number: int) -> jax.Array:
    """Independent random words: uint16 [number]."""
    # Drawn flat: a threefry draw of three short axes is ten times as slow on a CPU. The generator
    # makes 32 bits at a time: 16 are enough for each number here, which halves its work.
    words = jax.random.bits(key, (-(-number // 2),), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:number]


def _numbers(drawn: jax.Array, aspect: float) -> tuple[jax.Array, ...]:
    """What chance decides about candidates, four float arrays [turns, 5] of `drawn` [4, turns, 5].

    Uniform numbers between 0 and 1 for area, row and column, and the root of the aspect ratio.
    """
    area, stretch, row, column = (drawn.astype(jnp.float32) + 0.5) * 2.0**-_WORD
    return area, jnp.exp(math.log(aspect) * (stretch - 0.5)), row, column


def _place_blocks(
    numbers: tuple[jax.Array, ...],
    free: jax.Array,
    grid: tuple[int, int],
    num_masked: int,
    min_block: int,
) -> tuple[jax.Array, jax.Array]:
    """Adds at most one block per turn until ten candidates in a row are not acceptable.

    Returns what is `free` afterwards, uint16 [words, h], and how many of the M patches are still
    wanted. The grid is held as one bit a patch: counting and covering take a few operations a row.
    """

    def look(state: tuple, numbers: tuple) -> tuple:
        free, wanted, refused = state
        blocks = _candidates(numbers, wanted, grid, min_block)
        new = _count(blocks & free[None])
        acceptable = (new > 0) & (new <= wanted) & (refused < _ATTEMPTS)
        first = jnp.argmax(acceptable)
        found = acceptable[first]
        free = jnp.where(found, free & ~blocks[first], free)
        wanted = wanted - jnp.where(found, new[first], 0)
        return (free, wanted, jnp.where(found, 0, refused + _TOGETHER)), None

    start = (free, jnp.int32(num_masked), jnp.int32(0))
    (free, wanted, _), _ = jax.lax.scan(look, start, numbers)
    return free, wanted


def _candidates(
    numbers: tuple[jax.Array, ...], wanted: jax.Array, grid: tuple[int, int], min_block: int
) -> jax.Array:
    """Rectangles as bit masks, uint16 [5, words, h]; one too large for the grid is empty.

    Args:
      numbers: of `_numbers`, each [5].
    """
    area, stretch, row, column = numbers
    # The bounds are reversed where fewer than min_block patches are wanted, as in the original.
    side = jnp.sqrt(min_block + (wanted - min_block) * area)
    tall, wide = jnp.round(side * stretch), jnp.round(side / stretch)
    fits = (tall < grid[0]) & (wide < grid[1])
    top = jnp.floor(row * (grid[0] - tall + 1))
    bottom = jnp.where(fits, top + tall, top)
    left = jnp.floor(column * (grid[1] - wide + 1))
    rows = jnp.arange(grid[0], dtype=jnp.float32)[None, :]
    rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    columns = _columns_below(left + wide, grid) & ~_columns_below(left, grid)
    return jnp.where(rows[:, None, :], columns[:, :, None], jnp.uint16(0))


def _take(free: jax.Array, count: jax.Array, drawn: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """What is left of `free` patches, uint16 [words, h], after `count` of them are taken at random.

    Each patch has a number: 16 random bits, `drawn` [16 * words * h], and below them its position,
    so that no two are equal. Those with the highest numbers are taken. They are found from the
    highest bit down: are those of the undecided patches that have the bit set more than are still
    to be taken, or not? That is many times as fast as sorting on a CPU, and `count` may be traced.
    """
    positions = jnp.arange(grid[0] * grid[1], dtype=jnp.uint32).reshape(grid)
    digits = jnp.arange(positions.size.bit_length() - 1, -1, -1, dtype=jnp.uint32)
    places = _pack((positions[None] >> digits[:, None, None]) & 1)

    def decide(state: tuple, bit: jax.Array) -> tuple:
        undecided, remaining, count = state
        having = undecided & bit
        number = _count(having)
        enough = number >= count
        remaining = jnp.where(enough, remaining, remaining & ~having)
        undecided = jnp.where(enough, having, undecided & ~bit)
        return (undecided, remaining, jnp.where(enough, count, count - number)), None

    bits = jnp.concatenate([drawn.reshape(_WORD, *free.shape), places])
    (last, remaining, count), _ = jax.lax.scan(decide, (free, free, count), bits)
    return jnp.where(count > 0, remaining & ~last, remaining)


def _count(words: jax.Array) -> jax.Array:
    """Set bits of uint16 [..., words, h]: int32 [...]."""
    return jnp.sum(jax.lax.population_count(words), axis=(-2, -1), dtype=jnp.int32)


def _columns_below(limit: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Bits of the columns below each limit [n], float and at least 0: uint16 [n, words]."""
    first = _WORD * jnp.arange(-(-grid[1] // _WORD), dtype=jnp.float32)
    bits = jnp.clip(limit[:, None] - first[None, :], 0, _WORD).astype(jnp.uint32)
    return ((jnp.uint32(1) << bits) - 1).astype(jnp.uint16)


def _all_free(grid: tuple[int, int]) -> jax.Array:
    """A set bit for every patch: uint16 [words, h]."""
    return _pack(jnp.ones(grid, jnp.uint32))


def _pack(bits: jax.Array) -> jax.Array:
    """From numbers that are 0 or 1 to bits: uint32 [..., h, w] -> uint16 [..., words, h]."""
    height, width = bits.shape[-2:]
    words = -(-width // _WORD)
    rows = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, words * _WORD - width)])
    rows = rows.reshape(*bits.shape[:-2], height, words, _WORD)
    values = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
    return jnp.einsum("...w,w->...", rows, values).astype(jnp.uint16).mT


def _unpack(words: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """From bits to bool: uint16 [words, h] -> [h, w]."""
    bits = words.T[:, :, None] >> jnp.arange(_WORD, dtype=jnp.uint16)[None, None, :]
    return (bits & 1).reshape(grid[0], -1)[:, : grid[1]] == 1


def _num_turns(grid: tuple[int, int], num_masked: int) -> int:
    """Turns of the loop over candidates.

    A block takes about half of what is still wanted, and is harder to find the fuller the grid is
    (14x14 with M = 75: 5.1 turns on average, 12 here). With a minimum block of 16 patches, as
    published, the bound cuts off at most one draw in 1,000; with one of 4, one in 190 on grids of
    4x8, 8x8, 14x14, 16x16, 24x24, 40x40 and 12x40, and one in 70 on 4x40; with one of 1, one in 70
    on those and one in 9 on 4x40 (measured at shares from 0.38 to 0.95). What a cut leaves is a few
    patches, which topping up adds where exactly M are asked for.
    """
    patches = grid[0] * grid[1]
    crowding = math.sqrt(patches / max(patches - num_masked, 1))
    return math.ceil(1.5 * math.log2(num_masked + 1) * crowding)


def _fits(area: int, grid: tuple[int, int], aspect: float) -> bool:
    """Whether a block of `area` is below the grid's size in both directions for some aspect."""
    # Sides are rounded (half to even) and must then be below the grid's, so at most size - 0.5.
    tallest, widest = grid[0] - 0.5, grid[1] - 0.5
    lowest = max(aspect, area / widest**2)
    highest = min(1.0 / aspect, tallest**2 / area)
    return min(grid) > 1 and lowest < highest
