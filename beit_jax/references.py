"""Curves of runs that went well, to compare others with: reference_curves.json.

Of our own runs on the digits, and the few numbers that the authors of BEiT have published.
"""

import functools
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from flax.traverse_util import flatten_dict

CURVES = Path(__file__).with_name("reference_curves.json")
# Of the images seen, the share after which the reference was where this run is now. Our runs of
# different seeds are within a factor of two of each other.
BEHIND = 1 / 3
# Of a published result, what a run that has seen as much must have reached.
OF_PUBLISHED = 0.8


def alike(config: Mapping) -> list[dict]:
    """The curves of runs like the one of a resolved config.

    Each has a name, its source, the metric of training that it is of, the keys of the config that
    are `alike`, and points (images seen, least, largest value among its runs): one point where it
    is a published end.
    """
    flat = flatten_dict(dict(config), sep=".")
    return [
        reference
        for reference in _curves()
        if all(_plain(flat[key]) == value for key, value in reference["alike"].items())
    ]


def lag(reference: Mapping, seen: int, values: list[float], window: int) -> str | None:
    """What shows that a run learns more slowly than a reference; None if it does not.

    Args:
      reference: one of `alike`.
      seen: images that the run has seen.
      values: of the reference's metric, as training logged them.
      window: of how many of the last the median counts.
    """
    metric, points, name = reference["metric"], reference["points"], reference["name"]
    now, sign = statistics.median(values[-window:]), 1 if metric == "accuracy" else -1
    said = f"{metric} is {now:.4g} after {seen:,} images, "
    if len(points) == 1:
        (images, published, _), start = points[0], values[0]
        if seen >= images and (now - start) / (published - start) < OF_PUBLISHED:
            return f"{said}and {name} had {published:.4g} after {images:,}"
        return None
    slowest = ((images, low if sign > 0 else high) for images, low, high in points)
    there = next((images for images, value in slowest if sign * value >= sign * now), None)
    if there is not None and there <= BEHIND * min(seen, points[-1][0]):
        return f"{said}where {name} was after {there:,}"
    return None


@functools.cache
def _curves() -> list[dict]:
    return json.loads(CURVES.read_text(encoding="utf-8"))


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
