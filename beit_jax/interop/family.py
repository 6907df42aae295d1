"""What a family of foreign weights is: how it is recognised, what it says, how it is named.

A family looks at names and shapes, never at a file's name. What they leave open (heads, the layer
where BEiT v2's branch starts) comes from the published sizes, from a config beside the weights or
from the caller, and is never found by trying.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from beit_jax.errors import UserError
from beit_jax.interop.table import Table

Shapes = Mapping[str, tuple[int, ...]]  # foreign name -> shape

# Width to heads of the published sizes whose heads are not 64 wide (beit/ and beit2/).
PUBLISHED_HEADS = {544: 16, 1280: 16, 1408: 16}

# Mean and standard deviation of pixels in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # Inception's, which maps to [-1, 1]


class Hints(NamedTuple):
    """What is known beside the tensors."""

    about: Mapping[str, Any]  # config.json beside the weights; empty if there is none
    preprocessing: Mapping[str, Any]  # preprocessor_config.json likewise
    arguments: Mapping[str, Any]  # of the training command, where the checkpoint holds them
    num_heads: int | None = None
    early_layers: int | None = None


class Description(NamedTuple):
    """What the weights are, in the terms of a run's config."""

    label: str  # for people, such as "BEiT v2 base, masked image modelling"
    task: str  # mim, classify, encoder, teacher, dvae, vqkd or segment: which network they fill
    outputs: int  # the head's: codes, classes or the width of a projection; 0: no head
    config: dict[str, Any]  # dotted keys of configs/common.py -> values
    notes: tuple[str, ...] = ()  # what was assumed, one sentence each
    parts: tuple[str, ...] = ()  # top-level parameters that the file is to fill; (): all of them


class Family(NamedTuple):
    """One kind of weights."""

    name: str
    fits: Callable[[Shapes], bool]
    describe: Callable[[Shapes, Hints], Description]
    table: Callable[[Mapping], Table]  # of a resolved config (nested), for both directions


def heads_of(width: int, hints: Hints) -> int:
    """Attention heads of a transformer whose tensors do not show them."""
    if hints.num_heads is not None:
        heads = hints.num_heads
    elif "num_attention_heads" in hints.about:
        heads = hints.about["num_attention_heads"]
    elif width in PUBLISHED_HEADS or (width % 64 == 0 and width in (384, 768, 1024)):
        heads = PUBLISHED_HEADS[width] if width in PUBLISHED_HEADS else width // 64
    else:
        raise UserError(
            f"the weights do not say how many attention heads share their width of {width}, which "
            "is no published size: give --num-heads"
        )
    if heads < 1 or width % heads:
        raise UserError(f"--num-heads of {heads} does not divide the weights' width of {width}")
    return heads


def square_grid(patches: int, what: str) -> int:
    """Side of a square grid of `patches`."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise UserError(
            f"{what} is for {patches} patches, which is no square grid: put a config.json with "
            "image_size beside the weights"
        )
    return side


def stated_size(hints: Hints) -> tuple[int, int] | None:
    """Height and width of the images, where something beside the tensors says them."""
    size = (
        hints.about.get("image_size")
        or hints.about.get("pretrained_cfg", {}).get("input_size", ())[-2:]
        or hints.arguments.get("input_size")
    )
    if isinstance(size, int):
        return size, size
    return tuple(size) if size and len(size) == 2 else None


def count(shapes: Shapes, template: str, first: int = 0) -> int:
    """How many of the names that `template` gives for `first`, `first` + 1, ... there are.

    Raises:
      UserError: where one is missing between others.
    """
    before, after = template.split("{}")
    pattern = re.compile(re.escape(before) + "([0-9]{1,6})" + re.escape(after))
    numbers = {int(match[1]) for name in shapes if (match := pattern.fullmatch(name))}
    missing = next(number for number in itertools.count(first) if number not in numbers)
    if numbers and missing < max(numbers):
        raise UserError(
            f"the weights lack {template.format(missing)}, though they have "
            f"{template.format(max(numbers))}: take the whole checkpoint"
        )
    return missing - first


def half(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that map pixels to [-1, 1]: a number each where colours are not three."""
    return HALF if channels == 3 else ((0.5,), (0.5,))
