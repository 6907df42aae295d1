"""Pictures of what a network sees and makes, for TensorBoard, the run's folder and the report."""

import numpy as np
from jax.experimental import multihost_utils

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
    gathered = [np.asarray(multihost_utils.process_allgather(row, tiled=True)) for row in rows]
    return np.concatenate([_row(images[:count]) for images in gathered])


def _row(images: np.ndarray) -> np.ndarray:
    images = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    channels = images.shape[-1]
    # One channel is grey; of more than three the first three are shown.
    images = images[..., :3] if channels >= 3 else np.repeat(images[..., :1], 3, axis=-1)
    zoom = max(1, -(-TILE // images.shape[1]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    images = np.pad(images, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return np.concatenate(list(images), axis=1)
