"""PyTorch's weight files, read without PyTorch and without running anything in them.

`torch.save` writes a pickle, in which each tensor is a call, and the numbers beside it:

    _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)

A storage is a flat array that several tensors may share; offset and strides count its elements.
The pickle names it by a persistent id, `("storage", FloatStorage, key, device, elements)`.

Since PyTorch 1.6 the file is a zip archive, in which nothing is compressed:

    any_name/data.pkl        the pickle
    any_name/data/<key>      the bytes of each storage, 64 byte aligned in newer versions
    any_name/byteorder       "little" or "big"
    any_name/code/...        in TorchScript archives only: the program, which is not read

Before, and still with `_use_new_zipfile_serialization=False`, it is a row of pickles and bytes: a
magic number, the protocol 1001, a dictionary with the byte order, the pickle proper, the list of
storage keys, and then for each key an int64 (the number of elements) and the bytes.

A whole module that was pickled is a record with the dictionaries `_parameters`, `_buffers` and
`_modules`; a TorchScript module is one whose attributes are tensors and further modules.

Tensors are views of the memory map here: nothing is read before someone asks for the numbers, and
`files` then hands out a copy, so that the map leaves nothing in memory.
"""

import io
import mmap
import zipfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from beit_jax.interop import pickles, stand_ins
from beit_jax.interop.stand_ins import Damaged, Refused
from beit_jax.interop.tensors import CALLS, Storage, new_storage

_RESAVE = "load it with PyTorch on a little-endian machine and save it there again"
MAGIC = 0x1950A86A20F9469CFC6C
MOST_PICKLED = 2**26  # bytes: the names and numbers of a pickle, far more than any model has


class Loaded(NamedTuple):
    """What a PyTorch file holds."""

    root: Any  # containers, plain values, `Tensor`s and `Record`s
    kind: str


def read(data: mmap.mmap) -> Loaded:
    """Reads what a file holds, whichever of PyTorch's formats it has.

    Raises:
      Refused: names what the file would call, or which variant it is.
      Damaged, zipfile.BadZipFile or another error of a wrong value: the file is broken.
    """
    return _read_zip(data) if data[:2] == b"PK" else _read_legacy(data)


def _read_zip(data: mmap.mmap) -> Loaded:
    with zipfile.ZipFile(data) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    tops = [n.removesuffix("data.pkl") for n in entries if f"/{n}".endswith("/data.pkl")]
    if not tops:
        raise _other_zip(entries)
    top = min(tops, key=len)

    def content(name: str) -> memoryview:
        if top + name not in entries:
            raise Damaged(f"{name} is missing")
        return _stored(data, entries[top + name])

    if top + "byteorder" in entries and bytes(content("byteorder")[:16]) != b"little":
        raise Refused("holds numbers in big-endian order", _RESAVE)
    storages: dict[tuple, Storage] = {}

    def storage(identity: Any) -> Any:
        _, kind, key, _, count = identity
        new = new_storage(kind, key, count)
        if (key, kind) not in storages:
            storages[key, kind] = new
            new.place(content(f"data/{key}"))
        return storages[key, kind]

    root = pickles.read(_pickle(content("data.pkl")), CALLS, storage)
    script = top + "constants.pkl" in entries
    return Loaded(root, "TorchScript archive" if script else "PyTorch archive (zip)")


def _stored(data: mmap.mmap, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an entry; the local header before them has a length of its own."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise Refused("was compressed by another program", "unpack it and pack it with zip -0 -r")
    header = data[entry.header_offset : entry.header_offset + 30]
    if header[:4] != b"PK\3\4" or len(header) < 30:
        raise Damaged("an entry of the archive is not where its directory says")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + 30 + lengths
    return memoryview(data)[start : start + entry.file_size]


def _other_zip(names: Iterable[str]) -> Refused:
    if any(name.endswith("model.json") for name in names):
        return Refused(
            "is a TorchScript archive from before PyTorch 1.4",
            "load it with torch.jit.load of that time, and save its state_dict() with torch.save",
        )
    what = "NumPy arrays (.npz)" if any(n.endswith(".npy") for n in names) else "other files"
    return Refused(f"is a zip archive of {what}, not weights", "name a weight file inside it")


def _read_legacy(data: mmap.mmap) -> Loaded:
    stream = _pickle(memoryview(data)[:MOST_PICKLED])
    first = pickles.read(stream, CALLS)
    if first != MAGIC:
        return Loaded(first, "pickle")
    if pickles.read(stream, CALLS) != 1001:
        raise Damaged("another protocol than 1001")
    if not pickles.read(stream, CALLS)["little_endian"]:
        raise Refused("holds numbers in big-endian order", _RESAVE)
    roots: dict[str, Storage] = {}
    parts: list[tuple[Storage, str, int]] = []  # storages inside another one, oldest versions only

    def storage(identity: Any) -> Any:
        if identity[0] == "module":  # a class with its source code, which is not read
            return identity[1]
        _, kind, key, _, count, view = identity
        root = roots.setdefault(key, new_storage(kind, key, count))
        if view is None:
            return root
        _, offset, length = view
        part = new_storage(kind, key, length)
        parts.append((part, key, offset))
        return part

    root = pickles.read(stream, CALLS, storage)
    at = 0
    for key in pickles.read(stream, CALLS):
        at = at or stream.tell()
        if int.from_bytes(data[at : at + 8], "little") != roots[stand_ins.key(key)].count:
            raise Damaged("a storage has another length than the pickle says")
        roots[key].place(memoryview(data)[at + 8 :])
        at += 8 + len(roots[key].data)
    for part, key, offset in parts:
        if offset < 0:
            raise Damaged("a storage begins before another one")
        part.place(roots[key].data[offset * part.dtype.itemsize :])
    return Loaded(root, "PyTorch archive (legacy)")


def _pickle(content: memoryview) -> io.BytesIO:
    if len(content) > MOST_PICKLED:
        raise Refused(f"holds a pickle of more than {MOST_PICKLED:,} bytes beside its tensors")
    return io.BytesIO(content)
