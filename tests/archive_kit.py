"""Archives made by hand for tests: zip files around a pickle, broken and hostile ones."""

import io
import pickletools
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from beit_jax.errors import UserError
from beit_jax.interop.files import read

ARCHIVES = Path(__file__).parent / "golden" / "archives"


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of the entries, as PyTorch writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def unzipped(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def text(value: str) -> bytes:
    """The instruction that pushes a text."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    """The instruction that pushes an integer of up to 8 bytes."""
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape, strides, *, offset=0, count=4, kind="FloatStorage", key="0", device="cpu"):
    """The instructions that rebuild one tensor."""
    storage = text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text(device)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (b"(" + storage + number(count) + b"tQ" + number(offset))
        + (numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR")
    )


def pickled(program: bytes) -> bytes:
    """A zip archive of a pickle's instructions and one storage, "0", of four zeros."""
    return zipped({"top/data.pkl": b"\x80\x02" + program + b".", "top/data/0": bytes(16)})


def archive(value: bytes) -> bytes:
    """A zip archive whose pickle is {"x": value}."""
    return pickled(b"}" + text("x") + value + b"s")


def put(tmp_path: Path, content: bytes) -> str:
    """A file of that content."""
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    return str(path)


def sentence(path: str | Path) -> str:
    """What reading the path says is wrong."""
    with pytest.raises(UserError) as caught:
        read(str(path))
    said = str(caught.value)
    assert "\n" not in said and not said.endswith(".") and said.count(str(path)) == 1
    return said


def refusal(tmp_path: Path, content: bytes) -> str:
    """What a file of that content is told."""
    return sentence(put(tmp_path, content))


# Mutations


def mutations(seeds: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Broken archives: bytes, ends, zip headers and pickle instructions changed at random."""
    chance = random.Random(seed)
    for number in range(count):
        yield _KINDS[number % len(_KINDS)](chance.choice(seeds), chance)


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] = chance.choice((0, 1, 127, 128, 255, 46, 81, 82))
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _insert(data: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(data)), chance.choice((1, 4, 64, 1000))
    start = chance.randrange(len(data))
    return data[:at] + data[start : start + length] + data[at + chance.choice((0, 1, length)) :]


def _headers(data: bytes, chance: random.Random) -> bytes:
    """Changes numbers in zip's own structures."""
    marks = [i for i in range(len(data) - 4) if data[i : i + 2] == b"PK" and data[i + 2] < 9]
    if not marks:
        return _flip(data, chance)
    changed = bytearray(data)
    for _ in range(chance.choice((1, 2, 4))):
        at = chance.choice(marks) + chance.randrange(4, 46)
        if at + 4 <= len(changed):
            value = chance.choice(
                (0, 1, 8, 255, 2**16 - 1, 2**31, 2**32 - 1, chance.randrange(9999))
            )
            changed[at : at + 4] = value.to_bytes(4, "little")
    return bytes(changed)


_HOSTILE = (
    *(b"0", b"1", b"2", b"(", b".", b"R", b"\x81", b"b", b"Q", b"t", b"s", b"u", b"e", b"a", b"o"),
    *(
        b"\x85",
        b"\x86",
        b"\x87",
        b"}",
        b"]",
        b")",
        b"N",
        b"\x88",
        b"\x93",
        b"\x92",
        b"\x94",
        b"\x8f",
    ),
    *(b"\x82\x01", b"K\xff", b"J\xff\xff\xff\xff", number(2**62), number(-1), b"G" + b"\x7f" * 8),
    *(b"h\x00", b"h\x03", b"q\x00", b"q\x05", b"\x8a\xff" + b"\x7f" * 255, text("storage")),
    *(
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch\nFloatStorage\n",
        b"(ios\nsystem\n",
        b"Px\n",
    ),
    *(b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"B\xff\xff\xff\x7f"),
    *(b"c__builtin__\nset\n", b"c__builtin__\nlist\n", b"cnumpy\ndtype\n", numbers((2**40, 2, 3))),
)


def _instructions(data: bytes, chance: random.Random) -> bytes:
    """Drops, doubles, swaps and replaces whole instructions of a pickle."""
    entries = unzipped(data) if data[:2] == b"PK" else {"": data}
    name = next(n for n in entries if n.endswith("data.pkl") or not n)
    starts = []
    stream = io.BytesIO(entries[name])
    while True:  # the legacy format is a row of pickles
        try:
            starts += [position for _, _, position in pickletools.genops(stream)]
        except ValueError:
            break
    if not starts:  # safetensors hold none
        return _flip(data, chance)
    parts = [entries[name][i:j] for i, j in zip(starts, starts[1:] + [None], strict=True)]
    for _ in range(chance.choice((1, 1, 2, 4))):
        i, j = chance.randrange(len(parts)), chance.randrange(len(parts))
        action = chance.randrange(5)
        if action == 0:
            parts[i] = b""
        elif action == 1:
            parts[i] = parts[i] * chance.choice((2, 3, 1000))
        elif action == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif action == 3:
            parts[i] = chance.choice(_HOSTILE)
        else:
            parts[i] += chance.choice(_HOSTILE)
    entries[name] = b"".join(parts)
    return zipped(entries) if data[:2] == b"PK" else entries[name]


_KINDS = (_flip, _cut, _insert, _headers, _instructions, _instructions)
