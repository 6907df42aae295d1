"""Images that cannot be used: counted, listed, and fatal when they are too many."""

import threading
from pathlib import Path

from beit_jax.errors import UserError

_TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # file names may be any bytes


class BadFiles:
    """Unreadable images of a source: counted, listed once each, and fatal when too many."""

    def __init__(self, length: int, max_share: float, path: str | Path | None):
        self._length, self._max_share, self._path = length, max_share, path
        self._seen: dict[int, str] = {}
        self._lock = threading.Lock()

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
        path = Path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = path.read_text(**_TEXT).splitlines() if path.exists() else []
        if not any(line.split("\t")[0] == name for line in listed):
            with path.open("a", **_TEXT) as file:
                file.write(f"{name}\t{' '.join(reason.split())}\n")
