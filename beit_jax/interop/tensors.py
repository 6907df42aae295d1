"""Tensors as PyTorch's pickles describe them: flat storages, and views of them with strides.

`CALLS` stands for the functions of PyTorch that a weight file calls to rebuild its tensors.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from beit_jax.interop import stand_ins
from beit_jax.interop.stand_ins import Array, Damaged, Name, Record, Refused, key, would_call

NOT_READ = ", not read"  # ends what `plain` says of tensors
MOST_WALKED = 10_000_000  # entries and letters of names on all paths; ViT-L has 50,000

_NUMPY = {
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Byte": np.uint8,
    "Char": np.int8,
    "Short": np.int16,
    "Int": np.int32,
    "Long": np.int64,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
    "Untyped": np.uint8,
}
STORAGES = {
    f"{module}.{name}Storage": np.dtype(dtype)
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in _NUMPY.items()
}
# Tensors whose type has no storage class of its own name their type (`_rebuild_tensor_v3`).
_DTYPES = {
    f"torch.{name}": np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in (
        "uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 "
        "complex128 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    ).split()
} | {"torch.bool": np.dtype(np.bool_)}


class LazyTensor:
    """A tensor in a file: its size at once, its numbers when NumPy asks for them."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = shape, np.dtype(dtype), read

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype=None, copy: bool | None = None) -> np.ndarray:
        array = self._read()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"{array.dtype} becomes {np.dtype(dtype)} only in a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __repr__(self) -> str:
        return f"LazyTensor(shape={self.shape}, dtype={self.dtype})"


class Storage:
    """A flat array of the file; where it lies is known last in the legacy format."""

    def __init__(self, dtype: np.dtype, count: int):
        self.dtype, self.count = dtype, count
        self.data = memoryview(b"")

    def place(self, data: memoryview) -> None:
        size = self.count * self.dtype.itemsize
        if not 0 <= size <= len(data):
            raise Damaged("a storage is larger than its bytes")
        self.data = data[:size]


@dataclasses.dataclass(eq=False, slots=True)
class Tensor:
    """A tensor as the pickle describes it, unchecked."""

    storage: Any
    dtype: np.dtype
    offset: Any
    shape: Any
    strides: Any

    def lazy(self) -> LazyTensor:
        """The tensor, whose elements all lie in its storage."""
        if not isinstance(self.storage, Storage) or not self._described():
            raise Damaged("a tensor's description makes no sense")
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        held = len(self.storage.data) // self.dtype.itemsize
        if 0 not in self.shape and self.offset + reach > held:
            raise Damaged("a tensor reaches outside of its storage")
        return LazyTensor(self.shape, self.dtype, self._view)

    def _described(self) -> bool:
        if type(self.shape) is not tuple or type(self.strides) is not tuple:
            return False
        numbers = (self.offset, *self.shape, *self.strides)
        return (
            len(self.shape) == len(self.strides) <= 32
            and all(type(n) is int and 0 <= n < 2**62 for n in numbers)
            and math.prod(max(n, 1) for n in self.shape) < 2**60  # else NumPy refuses empty ones
        )

    def _view(self) -> np.ndarray:
        """The elements in the memory map, or a copy of the storage where it is not aligned."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        first, size = self.offset * self.dtype.itemsize, self.dtype.itemsize
        flat = np.frombuffer(self.storage.data[first : first + reach * size], np.uint8)
        if flat.ctypes.data % self.dtype.alignment:
            flat = flat.copy()
            flat.flags.writeable = False
        # A stride along an axis of one element says nothing, and may be too large for NumPy.
        strides = [s * size if n > 1 else 0 for n, s in zip(self.shape, self.strides, strict=True)]
        view = np.lib.stride_tricks.as_strided
        return view(flat.view(self.dtype), self.shape, strides)


def new_storage(kind: Any, name: Any, count: Any) -> Storage:
    """A storage of a persistent id, whose place is not known yet."""
    if type(kind) is not Name or type(key(name)) is not str or type(count) is not int:
        raise Damaged("a storage's description makes no sense")
    if kind.name not in STORAGES:
        raise Refused(f"holds a storage of type {kind}")
    return Storage(STORAGES[kind.name], count)


def _rebuild(storage: Storage, offset: int, shape: tuple, strides: tuple, *_) -> Tensor:
    return Tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_typed(storage, offset, shape, strides, _grad, _hooks, dtype: Name, *_) -> Tensor:
    if dtype.name not in _DTYPES:
        raise Refused(f"holds a tensor of type {dtype}")
    return Tensor(storage, _DTYPES[dtype.name], offset, shape, strides)


def _rebuild_subclass(function: Name, kind: Name, arguments: tuple, _attributes) -> Any:
    if function.name not in _REBUILDS:
        raise would_call(function)
    return _REBUILDS[function.name](*arguments)


def _first(value: Any, *_) -> Any:
    return value


_REBUILDS = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
}
CALLS: dict[str, Callable] = {
    **stand_ins.CALLS,
    **_REBUILDS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "torch.Size": tuple,
    "torch.device": lambda kind, index=None: kind if index is None else f"{kind:s}:{index:d}",
    "torch.serialization._get_layout": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    **{
        f"torch.jit._pickle.build_{kind}list": _first
        for kind in ("int", "double", "bool", "tensor")
    },
}


def lazy(value: Any) -> LazyTensor | None:
    """The tensor or NumPy array of a pickle, checked; None for everything else."""
    if isinstance(value, Tensor):
        return value.lazy()
    if isinstance(value, Array):
        return LazyTensor(value.array.shape, value.array.dtype, lambda: value.array)
    return None


def is_module(value: Any) -> bool:
    """Whether a record is one of a pickled or of a TorchScript module."""
    if not isinstance(value, Record):
        return False
    return value.kind.startswith("__torch__.") or "_parameters" in value.state


def module_tensors(module: Record) -> dict[str, LazyTensor]:
    """The tensors of a module under the names and in the order of its `state_dict()`."""
    found: dict[str, LazyTensor] = {}
    work = _Budget(MOST_WALKED, "holds modules inside each other without end")

    def walk(record: Record, prefix: str, depth: int) -> None:
        tensors, modules = _tables(record)
        work.spend(len(tensors) + len(modules) + (MOST_WALKED if depth > 64 else 1))
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                work.spend(len(prefix) + len(name))
                found[prefix + name] = value.lazy()
        for name, value in modules.items():
            if is_module(value):
                work.spend(len(prefix) + len(name))
                walk(value, f"{prefix}{name}.", depth + 1)

    walk(module, "", 0)
    return found


def _tables(module: Record) -> tuple[dict, dict]:
    """Where a module keeps its tensors, and where its modules."""
    state = module.state
    if module.kind.startswith("__torch__."):
        return state, state
    passing = state.get("_non_persistent_buffers_set")  # a set in every version that has it
    passing = passing if isinstance(passing, set) else set()
    buffers = {name: value for name, value in state["_buffers"].items() if name not in passing}
    return state["_parameters"] | buffers, state["_modules"]


class _Budget:
    """Work that a file may cause: what it shares can be met again and again on many paths."""

    def __init__(self, left: int, refused: str):
        self._left, self._refused = left, refused

    def spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise Refused(self._refused)


def plain(values: dict) -> dict[str, Any]:
    """Values without tensors and records: what is worth telling of what lies beside them."""
    work = _Budget(MOST_WALKED, "holds the same values under too many names")
    told = {}
    for name, value in values.items():
        count = _count(value, work)
        many = f"{count} tensor{'s' * (count > 1)}{NOT_READ}"
        told[str(label(name))] = many if count else _plain(value, work, 0)
    return told


def _count(root: Any, work: _Budget) -> int:
    """Tensors in containers and records, each object once."""
    seen, waiting, count = {id(root)}, [root], 0
    while waiting:
        value = waiting.pop()
        count += isinstance(value, Tensor)
        inner = value.state if isinstance(value, Record) else value
        if isinstance(inner, dict | list | tuple):
            work.spend(1 + len(inner))
            items = inner.values() if isinstance(inner, dict) else inner
            fresh = [x for x in items if id(x) not in seen]
            seen.update(map(id, fresh))
            waiting.extend(fresh)
    return count


def _plain(value: Any, work: _Budget, depth: int) -> Any:
    if isinstance(value, Record) and value.kind == "argparse.Namespace":
        value = value.state
    if not isinstance(value, dict | list | tuple | set | frozenset):
        return label(value)
    work.spend(100 * len(value) + 1)  # what is told takes memory, what is counted does not
    if depth > 50:
        return "..."
    if isinstance(value, dict):
        return {label(k): _plain(v, work, depth + 1) for k, v in value.items()}
    return [_plain(item, work, depth + 1) for item in value]


def label(value: Any) -> Any:
    """A plain value as it is, of another one what it is."""
    if value is None or isinstance(value, str | bytes | int | float):
        return value
    if isinstance(value, Record):
        return f"a {value.kind}"
    if isinstance(value, Array):
        return f"an array of shape {value.array.shape}"
    return str(value) if isinstance(value, Name) else f"a {type(value).__name__}"
