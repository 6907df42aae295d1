"""Two-way name tables: one row serves reading and writing a foreign weight file.

A row is `(torch name, flax path, transform)`. Names may hold placeholders such as `{i}`, which
stand for one number each and take the same value on both sides.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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


class Rule(NamedTuple):
    """A parameter's name on both sides."""

    torch: str
    flax: str
    transform: Transform = SAME


class Buffer(NamedTuple):
    """An array without a parameter: dropped on import, worked out again on export."""

    torch: str
    beside: str  # the Flax path whose presence calls for it
    value: Callable[[], np.ndarray]


class Table(NamedTuple):
    """All names of one weight family."""

    family: str  # for messages
    rules: tuple[Rule, ...]
    buffers: tuple[Buffer, ...] = ()


def import_params(table: Table, tensors: Mapping[str, Any], target: Mapping) -> dict:
    """Foreign arrays as a tree of NumPy arrays like `target`.

    Args:
      table: names of the family.
      tensors: foreign name to array, without any wrapping dictionary.
      target: the wanted parameters, a nested dictionary of anything with shape and dtype.

    Raises:
      UserError: where an array has no place, a parameter no array, or a shape differs; names them.
    """
    wanted, found, leftover = flatten_dict(target, sep="/"), {}, []
    names = [(rule.torch, rule.flax) for rule in table.rules]
    transforms = {rule.torch: rule.transform for rule in table.rules}
    buffers = [(buffer.torch, buffer.beside) for buffer in table.buffers]
    for name, value in tensors.items():
        if _translate(name, buffers) is not None:
            continue
        template, path = _translate(name, names) or (None, None)
        if path not in wanted:
            leftover.append(name)
            continue
        array = transforms[template].to_flax(np.asarray(value))
        if array.shape != wanted[path].shape:
            raise UserError(
                f"{name} in the {table.family} weights has the shape {array.shape}, but the "
                f"model's {path} has {wanted[path].shape}: give the model the size of the weights"
            )
        found[path] = array.astype(wanted[path].dtype)
    if leftover:
        raise UserError(
            f"the {table.family} weights hold {_listed(leftover)}, for which the model has no "
            "place: give the model the parts that the weights have"
        )
    missing = [path for path in wanted if path not in found]
    if missing:
        raise UserError(
            f"the {table.family} weights lack {_listed(missing)}, which the model needs: "
            "give the model only the parts that the weights have"
        )
    return unflatten_dict(found, sep="/")


def export_params(table: Table, params: Mapping) -> dict[str, np.ndarray]:
    """Parameters under the family's own names and layouts, with its buffers; arrays are contiguous.

    Raises:
      UserError: names the parameters for which the family has no name.
    """
    names = [(rule.flax, rule.torch) for rule in table.rules]
    transforms = {rule.flax: rule.transform for rule in table.rules}
    buffers = {buffer.beside: buffer for buffer in table.buffers}
    tensors, leftover = {}, []
    for path, value in flatten_dict(params, sep="/").items():
        match = _translate(path, names)
        if match is None:
            leftover.append(path)
            continue
        template, name = match
        tensors[name] = np.ascontiguousarray(transforms[template].to_torch(np.asarray(value)))
        if template in buffers:
            buffer = buffers[template]
            _, name = _translate(path, [(template, buffer.torch)])
            tensors[name] = buffer.value()
    if leftover:
        raise UserError(
            f"the {table.family} format has no name for {_listed(leftover)}: "
            "export the model in the format of its own family"
        )
    return tensors


def _translate(name: str, names: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """The template that `name` fits and its counterpart with the same numbers, or None."""
    for source, destination in names:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(source))
        match = re.fullmatch(pattern, name)
        if match:
            return source, destination.format(**match.groupdict())
    return None


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
