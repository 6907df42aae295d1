"""Masks: the official generator's statistics, exact counts, and what is refused."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import masking
from beit_jax.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mask_statistics.json").read_text())
CASES = {"14x14_75": ((14, 14), 75), "8x8_26": ((8, 8), 26)}


def _draw(num: int, make_mask) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(make_mask))(jax.random.split(jax.random.key(7), num)))


@pytest.mark.parametrize("name", CASES)
def test_statistics_before_topping_up_are_the_official_ones(name):
    golden = GOLDEN[name]
    grid, num_masked = CASES[name]
    make = partial(
        masking.blockwise_mask,
        grid=grid,
        num_masked=num_masked,
        min_block=golden["min_block"],
        exact=False,
    )
    masks = _draw(20_000, make)
    counts = masks.sum(axis=(1, 2))
    assert abs(counts.mean() - golden["mean_count"]) < 0.04  # 4 standard errors at 14x14
    shares = np.bincount(counts, minlength=num_masked + 1) / len(counts)
    assert len(shares) == num_masked + 1
    for count, share in golden["count_histogram"].items():
        error = math.sqrt(2 * share / golden["samples"])
        assert abs(shares[int(count)] - share) < 4 * error + 2e-4, count
    frequency = masks.mean(axis=0)
    assert np.abs(frequency - np.array(golden["position_frequency"])).max() < 0.02
    pairs = (masks[:, 1:] & masks[:, :-1]).mean()
    assert abs(pairs - golden["vertical_pair_frequency"]) < 0.002


@pytest.mark.parametrize(
    "grid, num_masked, min_block",
    [((14, 14), 75, 16), ((8, 8), 26, 4), ((4, 9), 15, 2), ((3, 64), 90, 2), ((7, 33), 231, 5),
     ((4, 4), 1, 1)],
)  # fmt: skip
def test_exact_masks_have_m_patches_on_any_grid(grid, num_masked, min_block):
    def make(key):
        return masking.blockwise_mask(key, grid, num_masked, min_block=min_block)

    masks = _draw(200, make)
    assert masks.shape == (200, *grid) and masks.dtype == bool
    assert (masks.sum(axis=(1, 2)) == num_masked).all()
    if num_masked < masks[0].size:
        assert len({mask.tobytes() for mask in masks}) > 10


def test_a_mask_depends_on_its_own_key_only():
    make = jax.jit(partial(masking.blockwise_mask, grid=(8, 8), num_masked=26, min_block=4))
    keys = jax.random.split(jax.random.key(7), 3)
    masks = jax.vmap(make)(keys)
    for key, mask in zip(keys, masks, strict=True):
        np.testing.assert_array_equal(make(key), mask)


def test_blocks_lie_right_on_a_grid_wider_than_a_machine_word():
    """One block of a wide grid is a filled rectangle, also from word to word, anywhere alike."""
    masks = _draw(
        4_000,
        lambda key: masking.blockwise_mask(key, (6, 70), 12, min_block=12, aspect=0.2, exact=False),
    )
    rows, columns = masks.any(axis=2), masks.any(axis=1)
    one_block = masks.sum(axis=(1, 2)) == rows.sum(axis=1) * columns.sum(axis=1)
    adjoining = (np.diff(columns.astype(int), axis=1) == 1).sum(axis=1) <= 1
    assert (one_block & adjoining).mean() > 0.3
    for first in (16, 32, 48, 64):
        assert (one_block & columns[:, first - 1] & columns[:, first]).sum() > 30
    middle = masks.mean(axis=(0, 1))[10:60]
    assert middle.max() < 1.35 * middle.min()


def test_topping_up_only_adds_patches_and_adds_them_anywhere():
    """A minimum block of M often fails, so that much is left to single patches."""
    make = partial(masking.blockwise_mask, grid=(6, 10), num_masked=20, min_block=20)
    before = _draw(4_000, partial(make, exact=False))
    after = _draw(4_000, make)
    assert (after >= before).all()
    added = after & ~before
    assert (before.sum(axis=(1, 2)) < 20).mean() > 0.05
    wanted = (20 - before.sum(axis=(1, 2))) / (60 - before.sum(axis=(1, 2)))
    expected = (~before * wanted[:, None, None]).sum(axis=0)
    np.testing.assert_allclose(added.sum(axis=0), expected, atol=5 * math.sqrt(expected.max()))


def test_the_loop_over_blocks_is_long_enough():
    """Twice the turns change no mask that matters: the bound cuts off less than 1 in 1,000."""
    grid, num_masked = (14, 14), 75
    turns = masking._num_turns(grid, num_masked)
    drawn = masking._draw(jax.random.key(0), 4 * 2_000 * 2 * turns * 5)
    numbers = masking._numbers(drawn.reshape(4, 2_000, 2 * turns, 5), 0.3)
    free = masking._all_free(grid)
    place = jax.jit(
        jax.vmap(lambda *n: masking._place_blocks(n, free, grid, num_masked, min_block=16)[0])
    )
    long, short = place(*numbers), place(*(number[:, :turns] for number in numbers))
    assert (long != short).any(axis=(1, 2)).mean() < 1e-3


def test_random_masks_are_uniform_with_exactly_m_patches():
    masks = _draw(20_000, lambda key: masking.random_mask(key, (4, 6), 9))
    assert (masks.sum(axis=(1, 2)) == 9).all()
    np.testing.assert_allclose(masks.mean(axis=0), 9 / 24, atol=0.015)
    pair = (masks[:, 1:] & masks[:, :-1]).mean()
    assert abs(pair - 9 / 24 * 8 / 23) < 0.003


def test_masked_indices_are_ascending_row_major_positions():
    mask = jnp.array([[False, True, False], [True, False, True]])
    indices = masking.masked_indices(mask, 3)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, [1, 3, 5])
    masks = _draw(50, lambda key: masking.random_mask(key, (5, 7), 11))
    many = np.asarray(jax.vmap(lambda m: masking.masked_indices(m, 11))(masks))
    for mask, indices in zip(masks, many, strict=True):
        np.testing.assert_array_equal(indices, np.flatnonzero(mask))


def test_a_batch_of_masks_has_no_host_callback_and_no_open_ended_loop():
    def batch(keys):
        masks = jax.vmap(lambda key: masking.blockwise_mask(key, (14, 14), 75, min_block=16))(keys)
        return jax.vmap(lambda mask: masking.masked_indices(mask, 75))(masks)

    jaxpr = str(jax.make_jaxpr(batch)(jax.random.split(jax.random.key(0), 4)))
    assert "callback" not in jaxpr and "while" not in jaxpr and "scan" in jaxpr


def test_number_of_masked_patches_is_the_rounded_share():
    number = masking.num_masked_patches
    assert number(75 / 196, (14, 14), kind="blockwise", min_block=16) == 75
    assert number(0.4, (8, 8), kind="blockwise", min_block=4) == 26
    assert number(1.0, (4, 4), kind="random", min_block=99) == 16


@pytest.mark.parametrize(
    "share, grid, kind, min_block, key",
    [
        (0.0, (8, 8), "random", 4, "config.mask.share"),
        (0.001, (8, 8), "blockwise", 1, "config.mask.share"),
        (1.1, (8, 8), "random", 4, "config.mask.share"),
        (-0.5, (8, 8), "random", 4, "config.mask.share"),
        (float("nan"), (8, 8), "random", 4, "config.mask.share"),
        (0.4, (8, 8), "blockwise", 27, "config.mask.min_block"),
        (0.4, (8, 8), "blockwise", 0, "config.mask.min_block"),
        (0.4, (2, 30), "blockwise", 16, "config.mask.min_block"),
        (0.4, (1, 30), "blockwise", 1, "config.mask.min_block"),
        (0.4, (8, 8), "blocks", 4, "config.mask.kind"),
    ],
)
def test_impossible_settings_name_the_value_to_change(share, grid, kind, min_block, key):
    with pytest.raises(UserError, match=key) as error:
        masking.num_masked_patches(share, grid, kind=kind, min_block=min_block)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


def test_refused_blocks_are_exactly_those_that_never_fit():
    """Against drawing: a block is refused where 2,000 single draws all come back without one."""
    for grid in [(2, 9), (3, 5), (4, 4), (2, 2)]:
        for area in range(1, min(grid[0] * grid[1], 12) + 1):
            drawn = masking._draw(jax.random.key(area), 4 * 2_000).reshape(4, 400, 5)
            blocks = jax.vmap(
                lambda *n, area=area, grid=grid: masking._candidates(n, area, grid, area)
            )(*masking._numbers(drawn, 0.3))
            assert masking._fits(area, grid, 0.3) == bool(blocks.any()), (grid, area)
