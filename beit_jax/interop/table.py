"""Two-way name tables: one row serves reading and writing a foreign weight file.

A row is `(torch name, flax path, transform)`. Names may hold placeholders such as `{i}`, which
stand for one number each and take the same value on both sides.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from beit_jax.errors import UserError


class Transform(NamedTuple):
    """How an array changes between the two layouts; each undoes the other exactly."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda array: array, lambda array: array)
LINEAR = Transform(np.transpose, np.transpose)  # [out, in] and [in, out]
CONV = Transform(  # [out, in, kh, kw] and [kh, kw, in, out]
    lambda array: array.transpose(2, 3, 1, 0), lambda array: array.transpose(3, 2, 0, 1)
)
CONV_TRANSPOSED = Transform(  # [in, out, kh, kw] and [kh, kw, in, out]
    lambda array: array.transpose(2, 3, 0, 1), lambda array: array.transpose(2, 3, 0, 1)
)


class Rule(NamedTuple):
    """A parameter's name on both sides."""

    torch: str
    flax: str
    transform: Transform = SAME
    part: tuple[int, int] = (0, 1)  # (i, n): the foreign array is part i of n along our last axis


class Buffer(NamedTuple):
    """An array without a parameter: dropped on import, worked out again on export."""

    torch: str
    beside: str  # the Flax path whose presence calls for it
    value: Callable[[], np.ndarray]


class Dropped(NamedTuple):
    """Foreign arrays that our model does not need, and why; a name may hold `{i}` and `{*}`."""

    torch: str
    reason: str


class Table(NamedTuple):
    """All names of one weight family."""

    family: str  # for messages
    rules: tuple[Rule, ...]
    buffers: tuple[Buffer, ...] = ()
    dropped: tuple[Dropped, ...] = ()


Row = TypeVar("Row", Rule, Buffer)


def dense(torch: str, flax: str) -> tuple[Rule, Rule]:
    """Rows of a linear layer."""
    return Rule(f"{torch}.weight", f"{flax}/kernel", LINEAR), Rule(f"{torch}.bias", f"{flax}/bias")


def conv(torch: str, flax: str) -> tuple[Rule, Rule]:
    """Rows of a convolution."""
    return Rule(f"{torch}.weight", f"{flax}/kernel", CONV), Rule(f"{torch}.bias", f"{flax}/bias")


def norm(torch: str, flax: str) -> tuple[Rule, Rule]:
    """Rows of a normalisation's gain and offset."""
    return Rule(f"{torch}.weight", f"{flax}/scale"), Rule(f"{torch}.bias", f"{flax}/bias")


def prefixed(rows: Iterable[Row], torch: str = "", flax: str = "") -> tuple[Row, ...]:
    """Rows for a network that lies inside another one on either side."""
    return tuple(type(row)(torch + row[0], flax + row[1], *row[2:]) for row in rows)


def within(collection: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows for a network that has other collections beside "params", each a tree of its own."""
    return prefixed(rows, flax=f"{collection}/")


def renamed(names: Iterable[str], source: Iterable[Rule], target: Iterable[Rule]) -> dict[str, str]:
    """One family's names to those that another has for the same places, where it has one."""
    first = [(rule.torch, rule.flax) for rule in source]
    second = [(rule.flax, rule.torch) for rule in target]
    places = {name: _translate(name, first) for name in names}
    found = {name: _translate(place[1], second) for name, place in places.items() if place}
    return {name: match[1] for name, match in found.items() if match}


class Match(NamedTuple):
    """What foreign arrays are to a model."""

    found: dict[str, np.ndarray]  # Flax path -> array of the wanted shape and dtype
    missing: list[str]  # Flax paths for which there is no array
    unexpected: list[str]  # foreign names for which there is no place
    dropped: dict[str, list[str]]  # reason -> foreign names
    widths: dict[str, int]  # foreign dtypes other than ours -> number of arrays


def match_params(table: Table, tensors: Mapping[str, Any], target: Mapping) -> Match:
    """Lays foreign arrays beside the parameters of a model.

    Args:
      table: names of the family.
      tensors: foreign name to array, or to anything with shape, dtype and `__array__`.
      target: the wanted parameters, a nested dictionary of anything with shape and dtype.

    Raises:
      UserError: where a shape differs; names both.
    """
    wanted = flatten_dict(target, sep="/")
    names = [(rule.torch, rule.flax) for rule in table.rules]
    rules = {rule.torch: rule for rule in table.rules}
    dropped = [(buffer.torch, "worked out again on export") for buffer in table.buffers]
    dropped += [(name, reason) for name, reason in table.dropped]
    match = Match({}, [], [], {}, {})
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        template, path = _translate(name, names) or (None, None)
        if path not in wanted:
            _, reason = _translate(name, dropped) or (None, None)
            place = match.dropped.setdefault(reason, []) if reason else match.unexpected
            place.append(name)
            continue
        rule, leaf = rules[template], wanted[path]
        if np.dtype(value.dtype) != leaf.dtype:
            kind = str(np.dtype(value.dtype))
            match.widths[kind] = match.widths.get(kind, 0) + 1
        array = rule.transform.to_flax(np.asarray(value))
        i, n = rule.part
        shape = leaf.shape if n == 1 else (*leaf.shape[:-1], leaf.shape[-1] // n)
        if array.shape != shape:
            raise UserError(
                f"{name} in the {table.family} weights has the shape {array.shape}, but the "
                f"model's {path} takes {shape}: give the model the size of the weights"
            )
        parts.setdefault(path, {})[i] = array.astype(leaf.dtype, copy=False)
        if len(parts[path]) == n:
            pieces = parts.pop(path)
            match.found[path] = (
                pieces[0] if n == 1 else np.concatenate([pieces[i] for i in range(n)], axis=-1)
            )
    match.missing.extend(path for path in wanted if path not in match.found)
    return match


def import_params(table: Table, tensors: Mapping[str, Any], target: Mapping) -> dict:
    """Foreign arrays as a tree of NumPy arrays like `target`, exactly: see `match_params`.

    Raises:
      UserError: where an array has no place, a parameter no array, or a shape differs; names them.
    """
    match = match_params(table, tensors, target)
    if match.unexpected:
        raise UserError(
            f"the {table.family} weights hold {listed(match.unexpected)}, for which the model has "
            "no place: give the model the parts that the weights have"
        )
    if match.missing:
        raise UserError(
            f"the {table.family} weights lack {listed(match.missing)}, which the model needs: "
            "give the model only the parts that the weights have"
        )
    return unflatten_dict(match.found, sep="/")


def export_params(table: Table, params: Mapping) -> dict[str, np.ndarray]:
    """Parameters under the family's own names and layouts, with its buffers; arrays are contiguous.

    Raises:
      UserError: names the parameters for which the family has no name.
    """
    rules: dict[str, list[Rule]] = {}
    for rule in table.rules:
        rules.setdefault(rule.flax, []).append(rule)
    tensors, leftover = {}, []
    for path, value in flatten_dict(params, sep="/").items():
        template, _ = _translate(path, [(flax, flax) for flax in rules]) or (None, None)
        if template is None:
            leftover.append(path)
            continue
        for rule in rules[template]:
            i, n = rule.part
            array = np.asarray(value) if n == 1 else np.split(np.asarray(value), n, axis=-1)[i]
            name = _translate(path, [(template, rule.torch)])[1]
            tensors[name] = np.ascontiguousarray(rule.transform.to_torch(array))
        for buffer in table.buffers:
            if buffer.beside == template:
                tensors[_translate(path, [(template, buffer.torch)])[1]] = buffer.value()
    if leftover:
        raise UserError(
            f"the {table.family} format has no name for {listed(leftover)}: "
            "export the model in the format of its own family"
        )
    return tensors


def _translate(name: str, names: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """The template that `name` fits and its counterpart with the same numbers, or None."""
    for source, destination in names:
        match = _pattern(source).fullmatch(name)
        if match:
            return source, destination.format(**match.groupdict())
    return None


@cache
def _pattern(template: str) -> re.Pattern:
    numbers = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(template))
    return re.compile(numbers.replace(r"\{\*\}", ".*"))


def listed(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
