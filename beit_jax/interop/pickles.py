"""A restricted reader of pickles: it builds containers, numbers and records, and runs nothing.

A pickle is a small program for a machine with a stack and a memo: most instructions push a value
or put the topmost ones into a list, a tuple or a dictionary. Three kinds are dangerous, because
Python's own machine imports and calls whatever they name:

    GLOBAL "torch._utils" "_rebuild_tensor_v2"   import this, push it
    REDUCE                                       call the function below with the arguments above
    NEWOBJ, BUILD                                make an object of a class, give it its attributes

The machine here imports nothing. GLOBAL pushes a `Name`; REDUCE looks that name up in a table of
our own functions and refuses all others; NEWOBJ makes an inert `Record` that remembers the class's
name and, after BUILD, the attributes. A name that is neither called by our table nor the class of
a record is refused too, so that nothing a file would import goes by unsaid.

What a file can cost is bounded by its size: instructions are counted, calls pay for the length of
their arguments (a name in the table may copy them), keys are short, and integers have 128 bits.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from beit_jax.interop.stand_ins import (
    Array,
    Damaged,
    Dtype,
    Name,
    Record,
    Refused,
    key,
    pairs,
    would_call,
)

MOST_INSTRUCTIONS = 1_000_000  # ViT-L with its optimizer's state takes about 50,000
MOST_COPIES = 4_000_000  # items and letters that calls may copy
INTEGER_BITS = 128  # the states of NumPy's random generators hold such integers


def read(
    stream: io.BytesIO, calls: Mapping[str, Callable], stored: Callable[[Any], Any] | None = None
) -> Any:
    """The value of the pickle that starts where `stream` stands, which then stands behind it.

    Args:
      calls: dotted name to our own function that stands for it.
      stored: gives the value for a persistent id, a reference to something outside the pickle.

    Raises:
      Refused: the pickle would import or call something outside `calls`.
      Damaged, or another error of a wrong value: it is no pickle, or a broken one.
    """
    return _Machine(stream, calls, stored).run()


class _Machine:
    def __init__(self, stream, calls, stored):
        self._stream, self._calls, self._stored = stream, calls, stored
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each open mark
        self._memo: dict[int, Any] = {}
        self._names: dict[str, Name] = {}
        size = stream.getbuffer().nbytes - stream.tell()
        self._allowance = 4096 + min(4 * size, MOST_COPIES)

    def run(self) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._stream)):
            if count >= MOST_INSTRUCTIONS:
                raise Refused(f"holds a pickle of more than {MOST_INSTRUCTIONS:,} instructions")
            if opcode.name in _LITERALS:
                if type(argument) is int and argument.bit_length() > INTEGER_BITS:
                    raise Damaged("an integer is too long")
                self._stack.append(argument)
            elif opcode.name in _FRESH:
                self._stack.append(_FRESH[opcode.name]())
            elif opcode.name in _METHODS:
                _METHODS[opcode.name](self, argument)
            elif opcode.name not in _SKIPPED:
                raise Refused(f"uses the pickle instruction {opcode.name}")
        for name in self._names.values():
            harmless = name.name in self._calls or name.name.startswith("torch.")
            if not name.is_class and not harmless:
                raise Refused(f"would import {name} (nothing of it was run)")
        return self._stack.pop()

    # The stack

    def _mark(self, _):
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pop(self, _):
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _get(self, index: int):
        self._stack.append(self._memo[index])

    def _put(self, index: int | None):
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    # Containers

    def _gather(self, make: Callable[[list], Any]):
        items = self._since_mark()
        self._stack.append(make(items))

    def _tuple(self, length: int):
        items = tuple(self._stack.pop() for _ in range(length))
        self._stack.append(items[::-1])

    def _extend(self, items: list, kind: type):
        target = self._stack[-1]
        if type(target) is not kind:
            raise Damaged(f"items for a {kind.__name__} go to something else")
        if kind is list:
            target.extend(items)
        elif kind is set:
            target.update(map(key, items))
        else:
            target.update(pairs(items))

    # Names, calls and records

    def _global(self, name: str):
        self._stack.append(self._names.setdefault(name, Name(name)))

    def _stack_global(self, _):
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Damaged("a name that is no text")
        self._charge((name, module))
        self._global(f"{module}.{name}")

    def _reduce(self, _):
        arguments, function = self._stack.pop(), self._stack.pop()
        self._call(function, arguments)

    def _new_object(self, _):
        arguments, kind = self._stack.pop(), self._stack.pop()
        if type(kind) is Name and kind.name not in self._calls and arguments == ():
            kind.is_class = True
            self._stack.append(Record(str(kind)))
        else:
            self._call(kind, arguments)

    def _new_object_with_keywords(self, _):
        if self._stack.pop() != {}:
            raise would_call(self._stack[-2])
        self._new_object(None)

    def _object(self, _):
        kind, *arguments = self._since_mark()
        self._call(kind, tuple(arguments))

    def _instance(self, name: str):
        arguments = tuple(self._since_mark())
        self._global(name)
        self._call(self._stack.pop(), arguments)

    def _call(self, function: Any, arguments: Any):
        if type(function) is not Name or type(arguments) is not tuple:
            raise Damaged("a call of something that is no function")
        if function.name not in self._calls:
            raise would_call(function)
        self._charge(arguments)
        self._stack.append(self._calls[function.name](*arguments))

    def _charge(self, arguments: tuple):
        sized = (str, bytes, tuple, list, dict, set, frozenset)
        self._allowance -= 1 + len(arguments)
        self._allowance -= sum(len(x) for x in arguments if isinstance(x, sized))
        if self._allowance < 0:
            raise Refused("copies its own contents again and again")

    def _build(self, _):
        state, target = self._stack.pop(), self._stack[-1]
        self._charge(state if type(state) is tuple else ())
        if isinstance(target, Record | Dtype | Array):
            target.build(state)
        elif (
            type(target) is not dict
        ):  # an OrderedDict's attributes, such as _metadata, are dropped
            raise Damaged("attributes for something that has none")

    def _persistent(self, _):
        if self._stored is None:
            raise Refused("refers to something outside of its pickle")
        self._stack.append(self._stored(self._stack.pop()))


_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
_SKIPPED = frozenset({"PROTO", "FRAME", "STOP"})
_FRESH = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark,
    "POP": _Machine._pop,
    "POP_MARK": lambda machine, _: machine._since_mark() and None,
    "DUP": lambda machine, _: machine._stack.append(machine._stack[-1]),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine._put),
    "TUPLE": lambda machine, _: machine._gather(tuple),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "LIST": lambda machine, _: machine._gather(list),
    "DICT": lambda machine, _: machine._gather(pairs),
    "FROZENSET": lambda machine, _: machine._gather(lambda items: frozenset(map(key, items))),
    "APPEND": lambda machine, _: machine._extend([machine._stack.pop()], list),
    "APPENDS": lambda machine, _: machine._extend(machine._since_mark(), list),
    "ADDITEMS": lambda machine, _: machine._extend(machine._since_mark(), set),
    "SETITEM": lambda machine, _: machine._extend(
        [machine._stack.pop(-2), machine._stack.pop()], dict
    ),
    "SETITEMS": lambda machine, _: machine._extend(machine._since_mark(), dict),
    "GLOBAL": lambda machine, name: machine._global(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._new_object,
    "NEWOBJ_EX": _Machine._new_object_with_keywords,
    "OBJ": _Machine._object,
    "INST": lambda machine, name: machine._instance(name.replace(" ", ".", 1)),
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
}
