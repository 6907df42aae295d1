"""What stands in a read pickle for the objects that Python's own reader would import and make.

A class becomes a `Name`, an object of it a `Record` of its attributes; Python's and NumPy's own
values, which training scripts leave in a checkpoint, become plain ones. `CALLS` is the whole list.
"""

import posixpath
from collections.abc import Callable
from typing import Any

import numpy as np

LONGEST_KEY = 4096


class Refused(Exception):
    """What a file asks for and does not get, as the end of a sentence, and what to do instead."""

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(what)
        self.remedy = remedy or (
            "load it where it was made, save the model's state_dict() with torch.save and name that"
        )


def would_call(function: object) -> Refused:
    return Refused(f"would call {function} (nothing of it was run)")


class Damaged(ValueError):
    """The instructions make no sense."""


class Name:
    """What a pickle would import: a dotted name and nothing behind it."""

    __slots__ = ("name", "is_class")

    def __init__(self, name: str):
        self.name, self.is_class = name, False

    def __str__(self) -> str:
        return self.name[:100].encode("unicode_escape").decode()


class Record:
    """An object of a class that was not imported: the class's name and the attributes."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str):
        self.kind, self.state = kind, {}

    def build(self, state: Any) -> None:
        if type(state) is tuple and len(state) == 2:  # (attributes, slots), either may be None
            state = (state[0] or {}) | (state[1] or {})
        if type(state) is not dict:
            raise Refused(f"holds a {self.kind} that is no plain object with attributes")
        self.state = state


def key(value: Any) -> Any:
    """`value`, if hashing and comparing it is cheap whatever the file says.

    Nested tuples overflow C's stack, and integers of 128 bits can all have the same hash.
    """
    if not isinstance(value, str | bytes | int | float | None | Name | Record):
        raise Refused(f"holds a {type(value).__name__} as the key of a dictionary or in a set")
    if isinstance(value, str | bytes) and len(value) > LONGEST_KEY:
        raise Refused(f"holds a name of more than {LONGEST_KEY} letters")
    if isinstance(value, int) and value.bit_length() > 64:
        raise Refused("holds a number of more than 64 bits as the key of a dictionary or in a set")
    return value


def pairs(items: list) -> dict:
    """[key, value, key, value, ...] as a dictionary."""
    if len(items) % 2:
        raise Damaged("a key without a value")
    return dict(zip(map(key, items[::2]), items[1::2], strict=True))


class Dtype:
    """A NumPy data type, whose byte order comes with BUILD."""

    def __init__(self, code: str, *_):
        if type(code) is not str:
            raise Damaged("a NumPy type without a name")
        if code[:1] not in "biufc" or len(code) > 3:
            raise Refused(f"holds a NumPy array of type {code[:20]!r}")
        self.dtype = np.dtype(code)

    def build(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder({"<": "<", ">": ">", "|": "|"}[key(state[1])])


class Array:
    """A NumPy array, whose contents come with BUILD."""

    def __init__(self, *_):
        self.array = np.zeros(0)

    def build(self, state: tuple) -> None:
        _, shape, kind, fortran, contents = state
        flat = np.frombuffer(_text(contents), kind.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def _text(contents: str | bytes) -> bytes:
    return contents.encode("latin1") if isinstance(contents, str) else contents


def _scalar(kind: Dtype, contents: str | bytes) -> Any:
    return np.frombuffer(_text(contents), kind.dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Damaged("bytes in another encoding")
    return text.encode("latin1")


def _dict(items: Any = ()) -> dict:
    items = items.items() if type(items) is dict else items
    return pairs([x for k, v in items for x in (k, v)])


def _set(items: list) -> set:
    return set(map(key, items))


def _both(names: str, *modules: str) -> list[str]:
    return [f"{module}.{name}" for module in modules for name in names.split()]


_BUILTIN, _NUMPY = ("builtins", "__builtin__"), ("numpy.core.multiarray", "numpy._core.multiarray")
CALLS: dict[str, Callable] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda factory=None: {},
    "argparse.Namespace": lambda: Record("argparse.Namespace"),
    "_codecs.encode": _encode,
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    **dict.fromkeys(_both("set frozenset", *_BUILTIN), _set),
    **dict.fromkeys(_both("dict", *_BUILTIN), _dict),
    **dict.fromkeys(_both("list", *_BUILTIN), lambda items=(): list(items)),
    **dict.fromkeys(_both("scalar", *_NUMPY), _scalar),
    **dict.fromkeys(_both("_reconstruct", *_NUMPY), Array),
    **dict.fromkeys(
        _both("Path PosixPath WindowsPath", "pathlib", "pathlib._local"), posixpath.join
    ),
}
