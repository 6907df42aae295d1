"""What lies in a tar file, without unpacking it and without believing it.

Only the bytes of plain files are ever read: names are text, links and devices are passed over, and
nothing gets written. An archive must end with the mark that tar writes last, so that half of one is
not taken for a whole.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from beit_jax.data.collection import limited
from beit_jax.errors import UserError

_MAX_HEAD = 1 << 20  # bytes of one header, long names and attributes included


class Member(NamedTuple):
    """A plain file in an archive."""

    path: Path  # of the tar file on the disk
    name: str  # as the archive has it
    offset: int  # of its first byte, from the start of the tar file on the disk
    size: int

    def read(self) -> bytes:
        """All its bytes; raises BadImage where they are too many."""
        size = limited(self.size)
        with open(self.path, "rb") as file:
            data = os.pread(file.fileno(), size, self.offset)
        if len(data) < size:
            raise UserError(f"{self.path} has become shorter while it was read.")
        return data


def members(path: Path, inside: Member | None = None) -> Iterator[Member]:
    """The plain files of a tar file, or of one `inside` it, in order.

    Raises:
        UserError: it is no tar file, is damaged, or ends too early.
    """
    what = f"{inside.name!r} in {path}" if inside else str(path)
    with open(path, "rb") as file:
        start, size = (inside.offset, inside.size) if inside else (0, os.path.getsize(path))
        heads = _Heads(file, start, size)
        try:
            for info in _infos(heads):
                yield Member(path, info.name, start + info.offset_data, info.size)
        # The parser fails in many ways, deep recursion among them, on what is no archive.
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
            raise UserError(
                f"{what} is no tar file, or is damaged or cut off near byte {heads.tell():,} "
                f"({' '.join(str(error).split())[:100]}): fetch it again."
            ) from None


def _infos(heads: "_Heads") -> Iterator[tarfile.TarInfo]:
    archive = tarfile.open(fileobj=heads, mode="r:")
    place = 0
    while info := archive.next():
        archive.members.clear()  # else they would be kept for ever
        # A negative size would lead back, and round in a circle.
        if info.size < 0 or archive.offset <= place or archive.offset > heads.size:
            raise tarfile.ReadError(f"{info.name!r} ends beyond it")
        place = archive.offset
        if info.isreg() and not info.issparse():
            yield info
    heads.seek(archive.offset)
    if heads.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")


class _Heads(io.RawIOBase):
    """A stretch of a file of which nobody reads much at once."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        super().__init__()
        self._file, self._start, self.size = file, start, size
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEAD:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self._file.seek(self._start + self._place)
        data = self._file.read(max(0, min(size, self.size - self._place)))
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < 0:
            raise tarfile.ReadError("a place before it")
        self._place = offset
        return offset

    def tell(self) -> int:
        return self._place
