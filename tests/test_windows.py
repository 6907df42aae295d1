"""Sliding windows against mmsegmentation's way, one image and one window at a time in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import windows
from beit_jax.windows import BAND, look

WINDOW, CELLS, CLASSES = (8, 8), 4, 3
ORIGINALS = [(13, 37), (41, 11), (8, 8), (6, 50)]  # height, width
SIZES = [(8, 23), (30, 8), (8, 8), (5, 40)]  # as resized; the last is less high than a window
KERNEL = np.random.default_rng(1).standard_normal((2, 2, 3, CLASSES)).astype(np.float32)
PLACE = np.random.default_rng(2).standard_normal((CELLS, CELLS, CLASSES)).astype(np.float32)


def network(images):
    """Logits [B, 4, 4, C] that depend on pixels and on the place in the window."""
    cells = images.reshape(len(images), CELLS, 2, CELLS, 2, 3) / 255
    return jnp.einsum("biyjxc,yxck->bijk", cells, KERNEL, precision="highest") + PLACE[None]


def canvases():
    random = np.random.default_rng(0)
    images = np.full((len(SIZES), 32, 41, 3), 99, np.uint8)
    for image, (height, width) in zip(images, SIZES, strict=True):
        image[:height, :width] = random.integers(0, 256, (height, width, 3))
    return images


def bilinear(x, size):
    """PyTorch's interpolate(align_corners=False) of [h, w, C] by its definition."""
    for axis, pixels in enumerate(size):
        cells = x.shape[axis]
        at = np.maximum((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0)
        low = np.floor(at).astype(int)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        high = np.minimum(low + 1, cells - 1)
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def slide(image, size, original, stride):
    """`slide_inference` of one image, whose windows look beyond it where it is too small."""
    total, count = np.zeros((32, 41, CLASSES)), np.zeros((32, 41, 1))
    lasts = [max(length - window, 0) for length, window in zip(size, WINDOW, strict=True)]
    starts = [sorted({min(s, last) for s in range(0, last + stride, stride)}) for last in lasts]
    for y in starts[0]:
        for x in starts[1]:
            window = image[y : y + 8, x : x + 8]
            total[y : y + 8, x : x + 8] += bilinear(np.asarray(network(window[None])[0]), WINDOW)
            count[y : y + 8, x : x + 8] += 1
    inside = np.s_[: size[0], : size[1]]
    return bilinear(total[inside] / count[inside], original)


def mirrored(image, width):
    return np.concatenate([image[:, :width][:, ::-1], image[:, width:]], axis=1)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def folded(views):
    """Log-probabilities of whole images [B, H, W, C]."""
    height, width = np.max(ORIGINALS, axis=0)
    canvas = jnp.zeros((len(SIZES), height + -height % BAND, width, CLASSES))

    def put(canvas, first, scores):
        return jax.lax.dynamic_update_slice_in_dim(canvas, scores, first, axis=1)

    return windows.fold_bands(put, canvas, views, jnp.array(height))


def looked(stride, mirror):
    sizes, originals = jnp.array(SIZES), jnp.array(ORIGINALS)
    extent = tuple(map(int, np.max(ORIGINALS, axis=0)))
    return look(
        network,
        jnp.asarray(canvases()),
        sizes,
        originals,
        extent,
        window=WINDOW,
        stride=stride,
        mirror=mirror,
    )


@pytest.mark.smoke
@pytest.mark.parametrize(("stride", "mirror"), [(5, False), (5, True), (8, False)])
def test_windows_are_averaged_and_resized_as_mmsegmentation_does(stride, mirror):
    found = jax.jit(lambda: folded([(1.0, looked(stride, mirror))]))()
    for i, (size, original) in enumerate(zip(SIZES, ORIGINALS, strict=True)):
        image = canvases()[i]
        logits = slide(mirrored(image, size[1]) if mirror else image, size, original, stride)
        expected = log_softmax(logits[:, ::-1] if mirror else logits)
        height, width = original
        np.testing.assert_allclose(found[i, :height, :width], expected, atol=2e-5)


def test_views_are_averaged_as_probabilities():
    def both():
        views = [looked(5, False), looked(8, True)]
        alone = [jnp.exp(folded([(1.0, view)])) for view in views]
        return jnp.exp(folded(list(zip((0.25, 0.75), views, strict=True)))), alone

    together, (one, other) = jax.jit(both)()
    np.testing.assert_allclose(together, 0.25 * one + 0.75 * other, atol=1e-6)
    assert np.abs(one - other).max() > 0.1


def test_an_image_of_one_window_needs_no_sliding():
    """Windows that others of the batch need leave it alone."""
    found = jax.jit(lambda: folded([(1.0, looked(5, False))]))()
    whole = log_softmax(bilinear(np.asarray(network(canvases()[2:3, :8, :8])[0]), (8, 8)))
    np.testing.assert_allclose(found[2, :8, :8], whole, atol=1e-5)


def test_windows_cover_every_pixel_and_end_with_the_image():
    for length in range(1, 40):
        number = windows.number_of(length, 8, 5)
        starts = [int(windows.start_of(i, length, 8, 5)) for i in range(number)]
        assert starts[0] == 0 and starts[-1] == max(length - 8, 0)
        assert all(0 < b - a <= 5 for a, b in zip(starts, starts[1:], strict=False))
