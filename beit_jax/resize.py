"""Learned positions taken from one grid of patches to another, on the host.

A grid is (h, w) patches. The sums are float64; results have the dtype of their source. Source:
beit/run_class_finetuning.py, lines 345-436, here for grids of any shape and for smaller ones too.
"""

import numpy as np
from scipy.interpolate import make_interp_spline

Grid = tuple[int, int]


def relative_position_table(table: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """A relative position table [(2h-1)(2w-1) + 3, heads] of the source grid for the target grid.

    Near offsets keep their values and far ones are stretched: the source's offsets are laid at
    `source_coordinates`, each axis by itself, and a cubic spline through them is read at the
    target's whole offsets. The last three rows (CLS) are kept. An equal grid changes nothing.

    Raises:
      ValueError: if the table is not one of the source grid.
    """
    if source == target:
        return table
    offsets = table[:-3].astype(np.float64)
    offsets = offsets.reshape(2 * source[0] - 1, 2 * source[1] - 1, table.shape[1])
    for axis in (0, 1):
        offsets = _resize_axis(offsets, axis, source[axis], target[axis])
    return np.concatenate([offsets.reshape(-1, table.shape[1]).astype(table.dtype), table[-3:]])


def position_embedding(embedding: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """Absolute positions [1, 1 + h*w, D] of the source grid for the target grid, the CLS row kept.

    Equal to PyTorch's `interpolate(..., size=target, mode="bicubic", align_corners=False)`.

    Raises:
      ValueError: if the embedding is not one of the source grid.
    """
    if source == target:
        return embedding
    width = embedding.shape[2]
    patches = embedding[0, 1:].astype(np.float64).reshape(*source, width)
    rows, columns = (_bicubic(*sizes) for sizes in zip(source, target, strict=True))
    patches = np.einsum("ih,jw,hwd->ijd", rows, columns, patches).reshape(1, -1, width)
    return np.concatenate([embedding[:, :1], patches.astype(embedding.dtype)], axis=1)


def source_coordinates(source: int, target: int) -> np.ndarray:
    """Where offsets -(source-1)..source-1 lie among the target's: float64 [2 * source - 1].

    Steps away from 0 are 1, q, q^2, ... with the q of `geometric_ratio`.
    """
    steps = geometric_ratio(source, target) ** np.arange(source - 1)
    away = np.cumsum(steps)
    return np.concatenate([-away[::-1], [0.0], away])


def geometric_ratio(source: int, target: int) -> float:
    """The q for which source-1 steps of 1, q, q^2, ... reach the outermost offset, target-1.

    From 1.01 to 1.5 it is bisected to 1e-6 as the official code does, and 1.5 stays the bound:
    where a small grid grows so much that 1.5 does not suffice (from 4 to 6 patches, say), the
    offsets beyond the outermost take its value. Below 1.01, where the official code stops and its
    offsets no longer meet, it is exact: smaller grids (q < 1), and large ones that grow a little.
    """

    def reach(q: float) -> float:
        return float(np.sum(q ** np.arange(source - 1)))

    left, right, tolerance = 1.01, 1.5, 1e-6
    if reach(left) > target - 1:
        left, right, tolerance = 0.0, 1.01, 1e-14
    while right - left > tolerance:
        q = (left + right) / 2
        left, right = (left, q) if reach(q) > target - 1 else (q, right)
    return q


def _resize_axis(offsets: np.ndarray, axis: int, source: int, target: int) -> np.ndarray:
    """Resizes one axis of offsets, 2 * source - 1 long, to 2 * target - 1."""
    if source == target:
        return offsets
    if source == 1:  # all that is known is the bias at no distance
        return offsets.repeat(2 * target - 1, axis)
    if target < source and target <= 2:  # the limit q = 0: nothing between centre and outermost
        return offsets.take([0, source - 1, -1] if target == 2 else [source - 1], axis)
    at = source_coordinates(source, target)
    spline = make_interp_spline(at, offsets, k=min(3, len(at) - 1), axis=axis)
    return spline(np.arange(1 - target, target).clip(at[0], at[-1]))


def _bicubic(source: int, target: int, a: float = -0.75) -> np.ndarray:
    """Weights float64 [target, source] of Keys' cubic convolution, borders repeated.

    No antialiasing when shrinking, as in PyTorch.
    """
    at = (np.arange(target)[:, None] + 0.5) * source / target - 0.5
    taps = np.floor(at).astype(int) + np.arange(-1, 3)
    x = np.abs(at - taps)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.zeros((target, source))
    rows = np.arange(target)[:, None]
    np.add.at(weights, (rows, taps.clip(0, source - 1)), np.where(x <= 1, near, far))
    return weights
