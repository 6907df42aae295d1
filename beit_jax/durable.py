"""Files that a run adds to, and that outlive a full disk, as the run does."""

import contextlib
import itertools
import os
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import Summary


class Lines:
    """Adds lines to a file, each whole or not at all; those that do not fit wait in memory."""

    def __init__(self, path: Path):
        """Opens or creates the file; raises OSError where that fails."""
        self._file = open(path, "ab", buffering=0)
        self._waiting = b""
        self.error = ""  # why lines wait

    def add(self, line: str) -> None:
        """Writes a line, and before it those that wait."""
        self._waiting += line.encode() + b"\n"
        with contextlib.suppress(OSError):  # which `error` keeps
            self._write()

    def flush(self) -> None:
        """Returns when all lines are on disk; raises OSError where they cannot be written."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        left = memoryview(self._waiting)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(end)  # no half line stays, on which another would be continued
            self.error = str(error)
            raise
        self._waiting, self.error = b"", ""


class Curves:
    """TensorBoard's files, written here and at once.

    The library's own writer leaves that to a thread, which dies of a full disk unheard, and whoever
    adds numbers then waits for it for ever.
    """

    def __init__(self, folder: Path, after: int | None):
        """Numbers of updates beyond `after` are written anew; None keeps what is there."""
        self._folder, self._after = folder, after
        self._numbers = itertools.count()
        self._events: EventsWriter | None = None  # a new file after one that broke off

    def add(self, summary: Summary, step: int) -> None:
        """Writes a summary; one that does not fit is lost, the others go to another file."""
        try:
            if self._events is None:
                self._events = self._open()
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        except OSError:  # which metrics.jsonl, with the same numbers, answers for
            self._events = None

    def flush(self) -> None:
        if self._events is not None:
            try:
                self._events.flush()
            except OSError:
                self._events = None

    def close(self) -> None:
        self.flush()
        if self._events is not None:
            self._events.close()

    def _open(self) -> EventsWriter:
        self._folder.mkdir(exist_ok=True)
        events = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{next(self._numbers)}")
        if self._after is not None:
            start = SessionLog(status=SessionLog.START)
            events.write_event(Event(step=self._after + 1, session_log=start))
            self._after = None
        return events
