"""Which part of an image is taken, and how it becomes a view."""

import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from beit_jax.errors import UserError


class View(NamedTuple):
    """One picture that a network sees of an example."""

    size: tuple[int, int]  # pixels, height and width
    interpolation: str  # a key of INTERPOLATIONS


class Augmentation(NamedTuple):
    """How training varies an example on the host."""

    crop_scale: tuple[float, float]  # share of the image's area
    crop_ratio: tuple[float, float]  # width over height
    flip: float  # probability of a horizontal flip
    magnitude: float = 0.0  # of RandAugment, from 0 (off) to 10
    mean: tuple[float, ...] = ()  # of pixels in [0, 1]; what RandAugment fills in


class Box(NamedTuple):
    """A part of an image in its pixels; fractions of a pixel are meant."""

    left: float
    top: float
    right: float
    bottom: float


INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_TRIES = 10
DRAWS = 4 * CROP_TRIES  # random numbers that one crop consumes at most


def random_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: np.ndarray,
) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop.

    Area uniform in `scale`, aspect ratio log-uniform in `ratio`, place uniform; after ten tries
    that do not fit, the largest centred box whose ratio is within bounds (torchvision's
    RandomResizedCrop, which the official transforms.py repeats).

    Args:
        draws: uniform numbers in [0, 1), [DRAWS].

    Returns:
        top, left, height and width in pixels, all within the image and at least 1 pixel.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area, aspect, y, x in draws.reshape(CROP_TRIES, 4):
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = max(1, min(width, round(height * aspect)))
    h = max(1, min(height, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def center_box(height: int, width: int, size: tuple[int, int], share: float) -> Box:
    """The box that evaluation sees of an image of `height` and `width` pixels.

    It is what "resize until both sides cover `size / share`, then cut `size` out of the centre"
    keeps, in the original's pixels, with the whole-pixel rounding that these two steps have; so
    that views of other sizes can be resizes of the same box (for a square `size`, torchvision's
    Resize of the shorter side and CenterCrop).
    """
    grow = max(int(size[0] / share) / height, int(size[1] / share) / width)
    box = []
    for original, wanted in ((width, size[1]), (height, size[0])):
        # The 1e-6 keeps 256.99999 from losing a pixel; sides shorter than the cut are cut whole.
        resized = max(int(original * grow + 1e-6), wanted)
        start = round((resized - wanted) / 2)
        box.append((start * original / resized, (start + wanted) * original / resized))
    (left, right), (top, bottom) = box
    return Box(left, top, right, bottom)


def resize(image: np.ndarray, view: View, box: Box | None = None) -> np.ndarray:
    """Resizes `box` of `image`, uint8 [H, W, ch], to the view, uint8 [*view.size, ch].

    Pillow's resampling, as in the official code: it widens the kernel when it shrinks, so nothing
    aliases. Without a box, the whole image.
    """
    height, width, channels = image.shape
    method = INTERPOLATIONS[view.interpolation]
    size = (view.size[1], view.size[0])
    if channels == 3:
        return np.asarray(Image.fromarray(image).resize(size, method, box=box))
    # Every other number goes channel by channel: Pillow's four-channel modes would take the last
    # one for opacity.
    planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(channels)]
    return np.stack([np.asarray(plane.resize(size, method, box=box)) for plane in planes], axis=-1)


def resize_quickly(image: np.ndarray, view: View) -> np.ndarray:
    """`resize` of a whole image for training, many times as fast.

    On photographs it stays above 37 dB of `resize` (bicubic). Views of fewer than 64 pixels across,
    where every pixel counts and none costs, and other interpolations than bicubic and lanczos are
    those of `resize`.
    """
    if min(view.size) < 64 or view.interpolation not in ("bicubic", "lanczos"):
        return resize(image, view)
    return _shrink(image, *view.size)


def _shrink(image: np.ndarray, down: int, across: int) -> np.ndarray:
    """OpenCV's cubic resize to [down, across], with what would alias taken out.

    Its kernel has a fixed width. So where a side shrinks by a factor f, three taps [t, 1 - 2t, t]
    blur first, with about the variance that Pillow's wider kernel would add; they suffice up to
    f = 2 (the largest t is that of the best PSNR), beyond which an image is halved again and again.
    """
    height, width, channels = image.shape
    if height > 2 * down or width > 2 * across:
        image = _shrink(image, min(2 * down, height), min(2 * across, width))
    factors = image.shape[0] / down, image.shape[1] / across
    if max(factors) > 1:
        taps = (min(0.1 * (factor**2 - 1), 0.2) for factor in factors)
        sigma_y, sigma_x = (_sigma_of_taps(tap) for tap in taps)
        image = cv2.GaussianBlur(
            image, (3, 3), sigmaX=sigma_x, sigmaY=sigma_y, borderType=cv2.BORDER_REPLICATE
        )
    image = cv2.resize(image, (across, down), interpolation=cv2.INTER_CUBIC)
    return image.reshape(down, across, channels)


def _sigma_of_taps(tap: float) -> float:
    """The deviation for which a Gaussian of three taps is [tap, 1 - 2 tap, tap]."""
    return (-2 * math.log(max(tap, 1e-6) / (1 - 2 * tap))) ** -0.5


def check_views(views: dict[str, View]) -> None:
    """Raises UserError for an interpolation that does not exist."""
    for view in views.values():
        if view.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"interpolation {view.interpolation!r} (config.data.interpolation or "
                f"config.tokenizer.interpolation) is none of {', '.join(INTERPOLATIONS)}."
            )
