"""Positions for another grid: official numbers, and what a resize must keep for any grid."""

import json

import numpy as np
import pytest
from golden_files import GOLDEN, load

from beit_jax import resize
from beit_jax.models.positions import relative_position_index

pytestmark = pytest.mark.smoke

TABLES = json.loads((GOLDEN / "relative_position_resize" / "meta.json").read_text())
EMBEDDINGS = json.loads((GOLDEN / "position_embedding_resize" / "meta.json").read_text())["grids"]
# Growing, shrinking, both at once, one axis alone, and grids too small for a cubic.
PAIRS = [
    ((4, 4), (6, 6)), ((14, 14), (15, 15)), ((24, 24), (25, 25)), ((14, 14), (8, 8)),
    ((5, 9), (8, 6)), ((7, 7), (7, 12)), ((14, 10), (3, 2)), ((3, 3), (2, 2)), ((9, 9), (1, 1)),
    ((2, 2), (5, 5)), ((1, 1), (4, 4)), ((1, 2), (2, 1)), ((2, 6), (1, 9)), ((3, 4), (4, 3)),
]  # fmt: skip


def random_table(grid, heads=2):
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    return np.random.default_rng(0).standard_normal((rows, heads)).astype(np.float32)


def offsets(table, grid):
    """A table's offsets [2h-1, 2w-1, heads], without its last three rows."""
    return table[:-3].reshape(2 * grid[0] - 1, 2 * grid[1] - 1, -1)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_resized_as_officially(name):
    about, arrays = TABLES[name], load("relative_position_resize/tensors")
    source, target = about["source_grid"], about["target_grid"]
    assert resize.geometric_ratio(source, target) == pytest.approx(about["ratio"], abs=1e-12)
    coordinates = resize.source_coordinates(source, target)
    np.testing.assert_allclose(coordinates, arrays[f"{name}/source_coordinates"], atol=1e-12)
    found = resize.relative_position_table(
        arrays[f"{name}/source"], (source, source), (target, target)
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, arrays[f"{name}/target"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_are_resized_as_in_pytorch(name):
    about, arrays = EMBEDDINGS[name], load("position_embedding_resize/tensors")
    source, target = tuple(about["source_grid"]), tuple(about["target_grid"])
    found = resize.position_embedding(arrays[f"{name}/source"], source, target)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, arrays[f"{name}/target"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found[:, 0], arrays[f"{name}/source"][:, 0])


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (14, 14)])
def test_an_equal_grid_changes_nothing(grid):
    table, embedding = random_table(grid), np.ones((1, 1 + grid[0] * grid[1], 4), np.float32)
    assert resize.relative_position_table(table, grid, grid) is table
    assert resize.position_embedding(embedding, grid, grid) is embedding


def test_an_axis_that_stays_is_left_alone():
    table = random_table((3, 4))
    found = offsets(resize.relative_position_table(table, (3, 4), (3, 7)), (3, 7))
    separate = [
        offsets(resize.relative_position_table(part, (1, 4), (1, 7)), (1, 7))
        for part in np.pad(offsets(table, (3, 4)), ((0, 0), (0, 3), (0, 0)))
    ]
    np.testing.assert_array_equal(found, np.concatenate(separate))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_rows_of_cls_and_the_centre_are_kept(source, target):
    table = random_table(source)
    found = resize.relative_position_table(table, source, target)
    assert len(found) == len(random_table(target))
    np.testing.assert_array_equal(found[-3:], table[-3:])
    centre = offsets(found, target)[target[0] - 1, target[1] - 1]
    expected = offsets(table, source)[source[0] - 1, source[1] - 1]
    np.testing.assert_allclose(centre, expected, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_outermost_offsets_stay_outermost(source, target):
    """Also where the ratio's bound of 1.5 stops the source short of the target's corner."""
    corners = np.ix_([0, -1], [0, -1])
    table = random_table(source)
    found = offsets(resize.relative_position_table(table, source, target), target)
    if 1 not in target:  # a single patch has no offset but 0
        expected = offsets(table, source)[corners]
        # The ratio is bisected to 1e-6, so the outermost offset is met to about 1e-4.
        np.testing.assert_allclose(found[corners], expected, atol=1e-3)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_symmetries_are_kept(source, target):
    even = offsets(random_table(source), source).copy()
    odd = even - even[::-1, ::-1]
    even = even + even[::-1, ::-1]
    for values, sign in ((even, 1), (odd, -1)):
        table = np.pad(values.reshape(-1, 2), ((0, 3), (0, 0)))
        found = offsets(resize.relative_position_table(table, source, target), target)
        np.testing.assert_allclose(found, sign * found[::-1, ::-1], atol=1e-6)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_transposed_grid_gives_the_transposed_table(source, target):
    table = random_table(source)
    turned = offsets(table, source).swapaxes(0, 1).reshape(-1, 2)
    found = resize.relative_position_table(
        np.concatenate([turned, table[-3:]]), source[::-1], target[::-1]
    )
    expected = offsets(resize.relative_position_table(table, source, target), target)
    np.testing.assert_allclose(offsets(found, target[::-1]), expected.swapaxes(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("source", "target", "close"),
    [
        ((14, 14), (24, 24), 1e-3), ((14, 14), (12, 12), 1e-3), ((14, 14), (9, 9), 1e-3),
        ((24, 24), (25, 25), 1e-3), ((12, 16), (20, 10), 2e-3), ((24, 24), (4, 4), 1e-3),
    ],
)  # fmt: skip
def test_a_smooth_table_is_that_function_of_the_mapped_offset(source, target, close):
    """The offset d of the target is the offset log(1 + d (q - 1)) / log q of the source."""

    def smooth(rows, columns):
        return np.exp(-((rows[:, None] / 8 - 0.2) ** 2)) * np.cos(columns[None] / 6)

    def mapped(size, onto):
        q, away = resize.geometric_ratio(size, onto), np.arange(1 - onto, onto)
        # The bisected ratio may leave the outermost offset a hair beyond the source's.
        steps = np.log1p(np.abs(away) * (q - 1)) / np.log(q)
        return np.sign(away) * np.minimum(steps, size - 1)

    values = smooth(*(np.arange(1 - size, size) for size in source)).astype(np.float32)
    table = np.pad(values.reshape(-1, 1), ((0, 3), (0, 0)))
    found = offsets(resize.relative_position_table(table, source, target), target)[..., 0]
    expected = smooth(*(mapped(*sizes) for sizes in zip(source, target, strict=True)))
    np.testing.assert_allclose(found, expected, atol=close)


@pytest.mark.parametrize(("source", "target"), [(14, 13), (14, 3), (24, 25), (64, 63), (5, 4)])
def test_ratios_beyond_the_official_bound_meet_the_outermost_offset(source, target):
    assert resize.source_coordinates(source, target)[-1] == pytest.approx(target - 1, abs=1e-9)
    assert (resize.geometric_ratio(source, target) < 1) == (target < source)


def test_rows_and_columns_are_those_of_the_model():
    """A table of row offsets alone, as the model indexes it, still is one after a resize."""
    for axis, source, target in ((0, (3, 5), (4, 6)), (1, (3, 5), (4, 2))):
        shape = [2 * size - 1 for size in source]
        values = np.moveaxis(np.zeros((*shape, 1)) + 0.0, axis, 0)
        values += np.arange(1.0 - source[axis], source[axis])[:, None, None]
        table = np.pad(np.moveaxis(values, 0, axis).reshape(-1, 1), ((0, 3), (0, 0)))
        table = resize.relative_position_table(table, source, target)
        pairs = table[np.asarray(relative_position_index(target))[1:, 1:], 0]
        place = np.indices(target)[axis].ravel()
        sign = np.sign(place[:, None] - place[None, :])
        np.testing.assert_array_equal(np.sign(np.round(pairs, 6)), sign)


def test_positions_of_another_grid_are_refused():
    with pytest.raises(ValueError):
        resize.relative_position_table(random_table((3, 3)), (3, 4), (4, 4))
    with pytest.raises(ValueError):
        resize.position_embedding(np.ones((1, 10, 2)), (3, 4), (4, 4))
