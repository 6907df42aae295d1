"""Weight files of other projects: which of a folder's files to read, and what is in them.

A file is known by its content, never by its name: safetensors begin with the length of a JSON
header, PyTorch's files with a zip archive's or a pickle's first bytes (see `pytorch`).
"""

import json
import mmap
import os
import stat
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from beit_jax.errors import UserError
from beit_jax.interop import pytorch, wrong
from beit_jax.interop.stand_ins import Damaged, Record, Refused
from beit_jax.interop.tensors import LazyTensor, is_module, label, lazy, module_tensors, plain

# The dictionaries that training scripts put around a state dict, the first present one counts:
# BEiT and DeiT, DeepSpeed, Lightning and timm, the custom dVAE of BEiT, DINO, averaged weights.
WRAPPERS = (
    "model", "module", "state_dict", "weights", "teacher", "model_ema", "state_dict_ema"
)  # fmt: skip
NOT_WEIGHTS = ("tensors.safetensors", "meta.json")  # inputs and outputs beside a checkpoint
# Tensors may share memory, but all of them together are at most so many times their file: else a
# few bytes could stand for a tensor that fits no machine.
MOST_SHARED = 16

_SAFETENSORS = {
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
# What broken bytes make the readers raise. Memory and recursion are bounded by design instead.
_BROKEN = (
    ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError,
    SafetensorError, TypeError, ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class Archive(NamedTuple):
    """A foreign checkpoint."""

    tensors: dict[str, LazyTensor]  # flat names, wrapping dictionaries removed
    about: dict  # config.json beside the weights
    preprocessing: dict  # preprocessor_config.json beside the weights
    extras: dict  # plain values that were stored with the tensors
    kind: str  # for people
    paths: tuple[str, ...]  # the files read


class _File(NamedTuple):
    """One weight file."""

    tensors: dict[str, LazyTensor]
    extras: dict
    kind: str


def read(path: str) -> Archive:
    """Reads a checkpoint: a weight file, or a folder with one, with shards or with DALL-E's pair.

    Raises:
      UserError: says what the file is instead, what is wrong with it, or which files could be
        meant.
    """
    given = Path(os.path.expanduser(path))
    folder = given if given.is_dir() else given.parent
    try:
        files = _choose(folder) if given.is_dir() else [("", given)]
    except OSError as error:
        raise _unreadable(folder, error) from error
    tensors, extras, kind = {}, {}, ""
    for prefix, file in files:
        found = _read_file(file)
        tensors |= {prefix + name: tensor for name, tensor in found.tensors.items()}
        extras |= found.extras
        kind = kind or found.kind
    shards = sum(prefix == "" for prefix, _ in files)
    return Archive(
        tensors,
        _read_json(folder / "config.json"),
        _read_json(folder / "preprocessor_config.json"),
        extras,
        f"{kind} in {shards} shards" if shards > 1 else kind,
        tuple(str(file) for _, file in files),
    )


def _choose(folder: Path) -> list[tuple[str, Path]]:
    """The weight files of a folder, each with what its tensors' names get in front."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [("", folder / name)]
        if index.is_file():
            return [("", folder / shard) for shard in _shards(index)]
    if (folder / "encoder.pkl").is_file() and (folder / "decoder.pkl").is_file():
        return [(f"{part}.", folder / f"{part}.pkl") for part in ("encoder", "decoder")]
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name not in NOT_WEIGHTS)
    found = [p for p in files if _looks_like_weights(p)]
    if len(found) == 1:
        return [("", found[0])]
    names = ", ".join(p.name for p in (found or files)[:8]) or "nothing"
    if found:
        raise UserError(f"{folder} holds several weight files ({names}); name one of them")
    raise UserError(f"{folder} holds no weight file (found {names}); name one or another folder")


def _shards(index: Path) -> list[str]:
    shards = _read_json(index).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or any(name != Path(name).name for name in names):
        raise UserError(f"{index} lists no files beside it under weight_map; download it again")
    return names


def _looks_like_weights(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return head.startswith((b"PK\3\4", b"\x80")) or _is_safetensors(head)


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a JSON header and the header's first letter."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _read_json(path: Path) -> dict:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error
    return found if isinstance(found, dict) else {}


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read ({error.strerror}); name a weight file or a folder with one"
    )


def _read_file(path: Path) -> _File:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is no ordinary file; name a weight file or a folder with one")
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"{path} is empty; download it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        found = _parse(path, data)
        if sum(t.nbytes for t in found.tensors.values()) > MOST_SHARED * len(data) + 2**20:
            raise Refused("holds tensors far larger than itself (expanded views)")
        return found
    except Refused as refused:
        raise UserError(f"{path} {refused}; {refused.remedy}") from refused
    except _BROKEN as error:
        reason = str(error).partition("\n")[0][:200]
        if not isinstance(error, Damaged | SafetensorError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(
            f"{path} is damaged or cut short ({reason}); download or copy it again"
        ) from error


def _parse(path: Path, data: mmap.mmap) -> _File:
    head = data[:4096]
    if _is_safetensors(head):
        return _read_safetensors(path)
    if head.startswith((b"PK", b"\x80")):
        return _released(_from_pickle(pytorch.read(data)), data)
    if data[-8:].rstrip().endswith(b"."):  # a pickle's last instruction; the oldest look like text
        try:
            return _released(_from_pickle(pytorch.read(data)), data)
        except _BROKEN:
            pass
    what = wrong.describe(head) or "in no known format; name a PyTorch or safetensors file"
    raise UserError(f"{path} is {what}")


def _read_safetensors(path: Path) -> _File:
    def read_one(name: str) -> np.ndarray:
        # Opened anew, since an open file keeps in memory what was read of it.
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name)

    def tensor(file, name: str) -> LazyTensor:
        part = file.get_slice(name)
        if part.get_dtype() not in _SAFETENSORS:
            raise Refused(f"holds {name} as {part.get_dtype()}, a type without a place here")
        dtype = _SAFETENSORS[part.get_dtype()]
        return LazyTensor(tuple(part.get_shape()), dtype, partial(read_one, name))

    with safe_open(path, framework="np") as file:  # checks that sizes and places are consistent
        tensors = {name: tensor(file, name) for name in file.keys()}
    return _File(_stripped(tensors), {}, "safetensors")


def _released(file: _File, data: mmap.mmap) -> _File:
    """The same, with tensors that are read as copies and leave nothing of the map in memory."""

    def read_one(tensor: LazyTensor) -> np.ndarray:
        array = np.array(tensor)
        data.madvise(mmap.MADV_DONTNEED)
        return array

    tensors = {
        name: LazyTensor(tensor.shape, tensor.dtype, partial(read_one, tensor))
        for name, tensor in file.tensors.items()
    }
    return file._replace(tensors=tensors)


def _from_pickle(loaded: pytorch.Loaded) -> _File:
    """The state dict in what a pickle holds, and the plain values around and in it."""
    chosen, beside = _unwrap(loaded.root)
    kind = loaded.kind
    if is_module(chosen):
        tensors = module_tensors(chosen)
        kind = kind if kind.startswith("TorchScript") else "pickled modules"
    else:
        tensors = {name: found for name, value in chosen.items() if (found := lazy(value))}
        beside |= {name: value for name, value in chosen.items() if name not in tensors}
    if not tensors:
        names = ", ".join(str(label(name))[:40] for name in list(beside)[:8]) or "nothing"
        raise Refused(f"holds no tensors where a state dict was looked for (found {names})")
    if not all(isinstance(name, str) for name in tensors):
        raise Damaged("tensors without names")
    return _File(_stripped(tensors), plain(beside), kind)


def _unwrap(root: Any) -> tuple[dict | Record, dict]:
    """The state dict or module, and what lies beside it."""
    if is_module(root):
        return root, {}
    if type(root) is not dict:
        raise Refused(f"holds no dictionary of tensors but a {type(root).__name__}")
    for name in WRAPPERS:
        if type(root.get(name)) is dict or is_module(root.get(name)):
            return root[name], {other: value for other, value in root.items() if other != name}
    return root, {}


def _stripped(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Without what DistributedDataParallel, torch.compile and Lightning put before every name."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in tensors):
            return _stripped({n.removeprefix(prefix): tensor for n, tensor in tensors.items()})
    return tensors
