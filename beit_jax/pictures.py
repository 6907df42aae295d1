"""Pictures of what a network sees and makes, for TensorBoard, the run's folder and the report."""

import colorsys
import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

TILE = 64  # pixels: smaller images are enlarged to at least this height
GAP = 2  # pixels between tiles


def picture_rows(*rows, count: int = 8) -> np.ndarray:
    """Lays images out as one picture: an argument is a row, an example a column.

    Args:
      rows: arrays [B, H, W, channels] in [0, 1], on one or all hosts, of the same size.
      count: the number of examples shown.

    Returns:
      uint8 [height, width, 3].
    """
    gathered = [multihost_utils.process_allgather(row[:count], tiled=True) for row in rows]
    return lay_out(*(np.asarray(images) for images in gathered))


def lay_out(*rows: np.ndarray) -> np.ndarray:
    """`picture_rows` of arrays that this host holds whole."""
    return np.concatenate([_row(images) for images in rows])


def _row(images: np.ndarray) -> np.ndarray:
    images = np.nan_to_num(images)  # of a network whose numbers went bad
    images = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    channels = images.shape[-1]
    # One channel is grey; of more than three the first three are shown.
    images = images[..., :3] if channels >= 3 else np.repeat(images[..., :1], 3, axis=-1)
    if images.shape[1] < TILE:  # smoothly: a person recognises little in an 8x8 checkerboard
        size = (round(TILE * images.shape[2] / images.shape[1]), TILE)
        images = np.stack([np.asarray(Image.fromarray(x).resize(size)) for x in images])
    images = np.pad(images, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return np.concatenate(list(images), axis=1)


def coloured(labels: np.ndarray) -> Image.Image:
    """Label numbers uint8 [H, W] as a picture with a palette, whose pixels are still the numbers.

    0 is black; the others' hues are a golden section apart, so that neighbours differ.
    """
    picture = Image.fromarray(labels)
    hues = ((number * 0.618034 % 1, 0.5 + 0.5 * (number % 2), 1.0) for number in range(1, 256))
    colours = [round(255 * value) for hue in hues for value in colorsys.hsv_to_rgb(*hue)]
    picture.putpalette([0, 0, 0, *colours])
    return picture


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Callable[[str, Image.Image], None]]:
    """Writes pictures by the names of their images, as PNG; replaces the folder when all are done.

    Of images whose names differ in their ending alone, all but the first keep it before `.png`; one
    in whose place a folder belongs is followed by `.png` once more.
    """
    part = folder.with_name(f"{folder.name}.part")
    if folder.is_file():  # which would be found out when all the work is done
        raise FileExistsError(errno.EEXIST, "it is a file", str(folder))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    def write(name: str, picture: Image.Image) -> None:
        inner = [p for p in PurePath(name).parts if p not in ("..", PurePath(name).anchor)]
        path = part.joinpath(*inner)
        for place in list(path.parents)[: len(inner) - 1]:
            if place.is_file():  # of the image b.jpg, where b.png is a folder
                place.rename(place.with_name(f"{place.name}.png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        alone = path.with_suffix(".png")
        picture.save(path.with_name(f"{path.name}.png") if alone.exists() else alone)

    yield write
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
