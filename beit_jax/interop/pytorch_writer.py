"""Writes what `torch.save({"model": state_dict}, path)` would, without PyTorch.

The archive is a zip, uncompressed: a pickle of the dictionary in `data.pkl`, whose tensors refer to
files `data/0`, `data/1`, ... of little-endian numbers. The pickle is put together instruction by
instruction, since the functions that it names are PyTorch's. `pytorch` reads such archives.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_STORAGES = {"float32": "FloatStorage", "int64": "LongStorage", "bool": "BoolStorage"}
_TOP = "archive"


def write(path: Path, tensors: Mapping[str, np.ndarray], key: str = "model") -> None:
    """Writes float32, int64 and bool arrays as the state dict under `key`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{_TOP}/data.pkl", _pickled(tensors, key))
        archive.writestr(f"{_TOP}/byteorder", "little")
        for number, array in enumerate(tensors.values()):
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            archive.writestr(f"{_TOP}/data/{number}", np.ascontiguousarray(little).data.cast("B"))
        archive.writestr(f"{_TOP}/version", "3\n")


def _pickled(tensors: Mapping[str, np.ndarray], key: str) -> bytes:
    values = b"".join(
        _text(name) + _tensor(number, array) for number, (name, array) in enumerate(tensors.items())
    )
    state = pickle.EMPTY_DICT + pickle.MARK + values + pickle.SETITEMS
    whole = pickle.EMPTY_DICT + _text(key) + state + pickle.SETITEM
    return pickle.PROTO + b"\x02" + whole + pickle.STOP


def _tensor(number: int, array: np.ndarray) -> bytes:
    """The call that makes a contiguous tensor from storage `number`."""
    storage = _tuple(
        _text("storage"),
        _name("torch", _STORAGES[str(array.dtype)]),
        _text(str(number)),
        _text("cpu"),
        _integer(array.size),
    )
    strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
    hooks = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _integer(0),  # where in the storage it begins
        _tuple(*map(_integer, array.shape)),
        _tuple(*map(_integer, strides)),
        pickle.NEWFALSE,  # takes no gradient
        hooks,
    )
    return _name("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(number: int) -> bytes:
    if number < 2**31:
        return pickle.BININT + struct.pack("<i", number)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", number)
