"""Images that cannot be used: counted, listed, and fatal when they are too many."""

import contextlib
import threading
from pathlib import Path

from beit_jax.errors import UserError


class BadFiles:
    """Unreadable images of a source: counted, listed once each, and fatal when too many."""

    def __init__(self, length: int, max_share: float, path: str | Path | None):
        self._length, self._max_share, self._path = length, max_share, path
        self._seen: dict[int, str] = {}
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []  # lines that could not be written
        self._listed: set[bytes] = set()  # names in the file, up to this place in it
        self._place = 0

    def add(self, index: int, name: str, reason: str) -> None:
        """Notes an image; raises UserError when the share is exceeded."""
        with self._lock:
            if index not in self._seen:
                self._seen[index] = f"{name}: {reason}"
                self._list(name, reason)
            count = len(self._seen)
        if count > self._max_share * self._length:
            raise self.error(f"{count:,} of {self._length:,} images ({count / self._length:.1%})")

    def error(self, what: str) -> UserError:
        """One sentence that says how many and why the first."""
        first = next(iter(self._seen.values()))
        listed = f"; see {self._path}" if self._path else ""
        return UserError(
            f"{what} cannot be used, above config.data.max_bad_share={self._max_share:g}; the "
            f"first is {first}{listed}."
        )

    def _list(self, name: str, reason: str) -> None:
        """Appends to the file unless an earlier run or another process has listed the image."""
        if self._path is None:
            return
        # Backslashes stand for what is no UTF-8: file names may be any bytes.
        line = f"{name}\t{' '.join(reason.split())}\n".encode(errors="backslashreplace")
        self._waiting.append(line)
        with contextlib.suppress(OSError):  # a full disk ends no training: the line waits
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab+") as file:
                file.seek(self._place)
                self._listed.update(other.split(b"\t")[0] for other in file)
                new = [one for one in self._waiting if one.split(b"\t")[0] not in self._listed]
                file.writelines(new)
                self._place = file.tell()
            self._waiting.clear()
