"""Sliding windows over images of any size, at static shapes.

A window's logits are enlarged to its pixels, averaged where windows overlap, and resized to the
original image, as mmsegmentation 0.11 does (`slide_inference`). Each of the three is linear and
acts on rows and columns alone, so for one axis they make one matrix, from the cells of all
windows to the pixels of the original; nothing of the size of an image times its classes is kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BAND = 32  # rows of the original whose probabilities are held at a time
_EXACT = jax.lax.Precision.HIGHEST  # else accelerators round to bfloat16


class Windows(NamedTuple):
    """Logits of all windows of one view of images, and what its pixels take from them."""

    logits: jax.Array  # float32 [B, ny, nx, h, w, C]
    rows: jax.Array  # float32 [B, H, ny, h]: weights of the original's rows
    columns: jax.Array  # float32 [B, W, nx, w]


def number_of(length, size: int, stride: int):
    """Windows that cover an axis of `length` pixels; ints or arrays of them."""
    beyond = length - size
    beyond = beyond * (beyond > 0)
    return (beyond + stride - 1) // stride + 1


def start_of(index, length, size: int, stride: int):
    """First pixel of window `index`; the last one is moved back to end with the axis."""
    return jnp.minimum(index * stride, jnp.maximum(length - size, 0))


def look(
    network: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    sizes: jax.Array,
    originals: jax.Array,
    extent: tuple[int, int],
    *,
    window: tuple[int, int],
    stride: int,
    mirror: bool,
) -> Windows:
    """Shows a network all windows of images.

    Args:
      network: uint8 [B, *window, ch] -> logits float32 [B, h, w, C].
      images: uint8 [B, *, *, ch], at least a window large.
      sizes: int32 [B, 2], height and width of what of them is the image.
      originals: int32 [B, 2], those of the original images.
      extent: height and width that no original exceeds.
      window: pixels, height and width.
      stride: pixels from one window to the next.
      mirror: whether the network sees the images mirrored; the result is mirrored back.
    """
    if mirror:
        images = jax.vmap(_mirrored)(images, sizes[:, 1])
    most = [number_of(images.shape[1 + axis], window[axis], stride) for axis in (0, 1)]
    logits = _logits(network, images, sizes, most, window, stride)

    def weights(axis: int):
        cells = logits.shape[3 + axis]
        of_one = partial(_weights, extent[axis], window[axis], stride, most[axis], cells)
        return jax.vmap(of_one)(originals[:, axis], sizes[:, axis])

    rows, columns = weights(0), weights(1)
    if mirror:
        back = jax.vmap(lambda c, o: c[jnp.maximum(o - 1 - jnp.arange(len(c)), 0)])
        columns = back(columns, originals[:, 1])
    return Windows(logits, rows, columns)


def _logits(network, images, sizes, most, window, stride) -> jax.Array:
    """What a network says of all windows, [B, *most, h, w, C]; the arguments are those of `look`.

    There are no more turns than the image with most windows needs; what others get beyond their own
    weighs nothing.
    """
    counts = [number_of(sizes[:, axis], window[axis], stride) for axis in (0, 1)]

    def cut(image, size, y, x):
        starts = [start_of(i, size[a], window[a], stride) for a, i in ((0, y), (1, x))]
        return jax.lax.dynamic_slice(image, (*starts, 0), (*window, image.shape[-1]))

    def one_more(number, logits):
        y, x = number // counts[1], number % counts[1]
        found = network(jax.vmap(cut)(images, sizes, y, x))
        put = jax.vmap(lambda all_, one, y, x: all_.at[y, x].set(one, mode="drop"))
        return put(logits, found, y, x)

    shown = jax.ShapeDtypeStruct((len(images), *window, images.shape[-1]), images.dtype)
    batch, *cells = jax.eval_shape(network, shown).shape
    return jax.lax.fori_loop(
        0, (counts[0] * counts[1]).max(), one_more, jnp.zeros((batch, *most, *cells), jnp.float32)
    )


def _mirrored(image: jax.Array, width: jax.Array) -> jax.Array:
    """[H, W, ch] with its first `width` columns in reverse order."""
    columns = jnp.arange(image.shape[1])
    return image[:, jnp.where(columns < width, width - 1 - columns, columns)]


def _weights(pixels: int, window: int, stride: int, most: int, cells: int, original, size):
    """What pixels of one axis of the original take from the cells of windows.

    Args:
      pixels: of the result, of which the first `original` are meant.
      window, stride: pixels.
      most: windows of the result.
      cells: logits that a window has along this axis.
      original, size: pixels of the original and of the resized image.

    Returns:
      float32 [pixels, most, cells]; each row sums to 1.
    """
    enlarge = jax.image.resize(jnp.eye(cells), (window, cells), "bilinear", antialias=False)
    number = jnp.arange(most)
    start = start_of(number, size, window, stride)
    # The two resized pixels around each original one, as PyTorch's bilinear `interpolate`.
    at = jnp.maximum((jnp.arange(pixels) + 0.5) * size / original - 0.5, 0.0)
    low = jnp.floor(at).astype(jnp.int32)
    total = 0.0
    for pixel, weight in ((low, low + 1 - at), (low + 1, at - low)):
        place = jnp.minimum(pixel, size - 1)[:, None] - start[None]  # within each window
        covers = (place >= 0) & (place < window) & (number < number_of(size, window, stride))[None]
        share = covers / covers.sum(1, keepdims=True)
        total += (weight[:, None] * share)[..., None] * enlarge[place.clip(0, window - 1)]
    return total


def fold_bands(
    fn: Callable[[Any, jax.Array, jax.Array], Any],
    start: Any,
    views: Sequence[tuple[float, Windows]],
    height: jax.Array,
) -> Any:
    """Folds over bands of `BAND` rows of the originals.

    Args:
      fn: `(carry, first row, log-probabilities float32 [B, BAND, W, C]) -> carry`; the
        probabilities are the views' weighted mean.
      start: the first carry.
      views: windows with their weights, which sum to 1.
      height: rows that are to be seen, at most those of the views rounded up to whole bands.
    """
    # The columns at once, which is small as long as the rows are cells.
    wide = [jnp.einsum("byxhwc,bpxw->byhpc", *(v.logits, v.columns), precision=_EXACT)
            for _, v in views]  # fmt: skip
    spare = -views[0][1].rows.shape[1] % BAND
    rows = [jnp.pad(view.rows, ((0, 0), (0, spare), (0, 0), (0, 0))) for _, view in views]

    def one_more(number, carry):
        first, found = number * BAND, None
        for (weight, _), cells, matrix in zip(views, wide, rows, strict=True):
            band = jax.lax.dynamic_slice_in_dim(matrix, first, BAND, axis=1)
            logits = jnp.einsum("bryh,byhpc->brpc", band, cells, precision=_EXACT)
            scores = jax.nn.log_softmax(logits) + jnp.log(weight)
            found = scores if found is None else jnp.logaddexp(found, scores)
        return fn(carry, first, found)

    return jax.lax.fori_loop(0, (height + BAND - 1) // BAND, one_more, start)
