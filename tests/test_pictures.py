"""Picture grids."""

import numpy as np
import pytest
from PIL import Image

from beit_jax.pictures import GAP, TILE, picture_rows, write_folder


def test_rows_and_columns_are_where_they_should_be():
    images = np.stack([np.full((8, 8, 1), v) for v in (0.0, 0.5, 1.0)])
    grid = picture_rows(images, 1 - images)
    step = TILE + GAP
    assert grid.shape == (2 * step, 3 * step, 3) and grid.dtype == np.uint8
    centres = grid[TILE // 2 :: step, TILE // 2 :: step, 0]
    np.testing.assert_array_equal(centres, [[0, 128, 255], [255, 128, 0]])


def test_values_that_are_no_numbers_are_black():
    assert not picture_rows(np.full((1, TILE, TILE, 1), np.nan))[:TILE, :TILE].any()


def test_more_channels_than_three_and_values_outside_the_range():
    images = np.tile(np.array([-1.0, 0.2, 2.0, 0.7, 0.9]), (1, TILE, TILE, 1))
    assert picture_rows(images)[0, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("turn", [1, -1])
def test_pictures_and_folders_of_one_name_stand_beside_each_other(turn, tmp_path):
    names = ["b.jpg", "b.png/c/x.jpg", "b.png/x.jpg"]
    with write_folder(tmp_path / "out") as put:
        for number, name in enumerate(names[::turn]):
            put(name, Image.fromarray(np.full((1, 1), number, np.uint8)))
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    written = {str(path.relative_to(tmp_path)): path for path in found}
    alone = "out/b.png.png" if turn == 1 else "out/b.jpg.png"
    assert sorted(written) == sorted([alone, "out/b.png/c/x.png", "out/b.png/x.png"])
    assert np.asarray(Image.open(written[alone])).item() == names[::turn].index("b.jpg")


def test_a_file_in_the_folders_place_is_seen_at_once(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="it is a file"):
        write_folder(tmp_path / "out").__enter__()
