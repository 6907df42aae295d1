"""RandAugment (arXiv 1909.13719) as the official fine-tuning runs it: rand-m9-mstd0.5-inc1 of timm.

Two operations are drawn out of fifteen, with replacement; each is applied with probability 1/2, at
a level drawn around the magnitude. All of them grow stronger with the level ("inc1"). They are
Pillow's own, on the views as they come out of crop, flip and resize.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LAYERS = 2  # operations of one image
PROBABILITY = 0.5  # of each to be applied
DEVIATION = 0.5  # of the level from the magnitude
HIGHEST = 10.0  # level


class Step(NamedTuple):
    """One operation of a plan."""

    operation: str  # a key of OPERATIONS
    level: float  # share of the highest, 0 to 1
    sign: int  # the direction of an operation that has one


Fill = int | tuple[int, ...]  # what comes in from beyond the edges
Operation = Callable[[Image.Image, Step, Fill], Image.Image]


def draw(generator: np.random.Generator, magnitude: float) -> list[Step]:
    """What happens to one image; `magnitude` is from 0 to 10."""
    plan = []
    for _ in range(LAYERS):
        operation = list(OPERATIONS)[generator.integers(len(OPERATIONS))]
        applied, forwards = generator.random(2) < (PROBABILITY, 0.5)
        level = np.clip(generator.normal(magnitude, DEVIATION), 0.0, HIGHEST)
        if applied:
            plan.append(Step(operation, float(level) / HIGHEST, 1 if forwards else -1))
    return plan


def apply(image: np.ndarray, plan: Sequence[Step], mean: Sequence[float]) -> np.ndarray:
    """Carries out a plan on uint8 [H, W, 1 or 3].

    Args:
      image: not changed.
      plan: of `draw`.
      mean: of pixels in [0, 1], one number or one a channel; fills in from beyond the edges.
    """
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    fill = tuple(min(255, round(255 * value)) for value in mean)
    fill = fill[0] if grey else fill * (3 // len(fill))
    for step in plan:
        picture = OPERATIONS[step.operation](picture, step, fill)
    return np.asarray(picture).reshape(image.shape)


def _affine(coefficients: Callable[[Image.Image, float], tuple[float, ...]]) -> Operation:
    """An operation that takes the pixel at (x, y) from (a x + b y + c, d x + e y + f)."""

    def operation(image: Image.Image, step: Step, fill: Fill) -> Image.Image:
        found = coefficients(image, step.sign * step.level)
        return image.transform(
            image.size, Image.Transform.AFFINE, found, Image.Resampling.BICUBIC, fillcolor=fill
        )

    return operation


def _rotate(image: Image.Image, step: Step, fill: Fill) -> Image.Image:
    degrees = 30.0 * step.sign * step.level
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)


def _enhance(kind: type) -> Operation:
    """An operation that blends with, or away from, an image without the quality named."""
    return lambda image, step, fill: kind(image).enhance(1.0 + 0.9 * step.sign * step.level)


def _posterize(image: Image.Image, step: Step, fill: Fill) -> Image.Image:
    unit = 2 ** (4 + int(step.level * 4))  # which is all at the highest level; no bit is left then
    return _mapped(image, [value // unit * unit for value in range(256)])


def _solarize(image: Image.Image, step: Step, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(step.level * 256))


def _solarize_add(image: Image.Image, step: Step, fill: Fill) -> Image.Image:
    added = int(step.level * 110)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return _mapped(image, table)


def _mapped(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, step, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, step, fill: ImageOps.equalize(image),
    "invert": lambda image, step, fill: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda image, level: (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": _affine(lambda image, level: (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": _affine(lambda image, level: (1, 0, 0.45 * level * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda image, level: (1, 0, 0, 0, 1, 0.45 * level * image.height)),
}
