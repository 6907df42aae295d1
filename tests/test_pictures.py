"""Picture grids."""

import numpy as np

from beit_jax.pictures import GAP, TILE, picture_rows


def test_rows_and_columns_are_where_they_should_be():
    images = np.stack([np.full((8, 8, 1), v) for v in (0.0, 0.5, 1.0)])
    grid = picture_rows(images, 1 - images)
    step = TILE + GAP
    assert grid.shape == (2 * step, 3 * step, 3) and grid.dtype == np.uint8
    centres = grid[TILE // 2 :: step, TILE // 2 :: step, 0]
    np.testing.assert_array_equal(centres, [[0, 128, 255], [255, 128, 0]])


def test_more_channels_than_three_and_values_outside_the_range():
    images = np.tile(np.array([-1.0, 0.2, 2.0, 0.7, 0.9]), (1, TILE, TILE, 1))
    assert picture_rows(images)[0, 0].tolist() == [0, 51, 255]
