"""Saving that survives a full disk: training goes on, and the next save may succeed."""

import math
import time

import jax

from beit_jax import checkpoint, metrics, preemption
from beit_jax.errors import UserError

RETRY_SECONDS = 60.0  # after a save that failed


class Saver:
    """Saves a run's state, and ends the run only after several failures in a row.

    Of several processes, one that cannot save ends all of them: the others would wait for it.
    """

    def __init__(
        self,
        keeper: checkpoint.Keeper,
        writer: metrics.Writer,
        stop: preemption.Stop,
        max_failed: int,
    ):
        """`max_failed` saves in a row may fail, the last of them ends the run.

        `stop` is told what is saved.
        """
        self._keeper, self._writer, self._stop = keeper, writer, stop
        self._max_failed = max_failed
        self._failed = 0  # in a row
        self._error = ""  # of the last of them
        self._retry_at = math.inf
        self._on_disk = stop.saved  # the update of the newest checkpoint
        self._writing: int | None = None  # the update that is written in the background
        stop.wait_for_save = self._came_through

    def due(self) -> bool:
        """Whether a save that failed is to be tried again now."""
        if self._writing is not None and jax.process_count() == 1 and not self._keeper.saving():
            self._wait()
        return time.monotonic() >= self._retry_at

    def save(self, state) -> None:
        """Copies the state off the devices and writes it in the background.

        Raises:
          UserError: that was the last of the failures in a row that are tolerated.
        """
        self._wait()
        try:
            self._writer.flush()  # what led here is on disk before the checkpoint is
            self._keeper.save(state)
        except Exception as error:
            self._note(error)
        else:
            self._writing = self._stop.saved = int(state.step)
            self._stop.unsaved = False

    def finish(self, state) -> None:
        """Returns when the state is on disk; tries as often as is tolerated."""
        while not self._wait():
            time.sleep(RETRY_SECONDS)
            self.save(state)

    def finish_now(self) -> None:
        """Returns when the last save is on disk; raises UserError where it is not."""
        if not self._wait():
            raise UserError(
                f"the run was asked to stop, but its state could not be saved ({self._error}); "
                "make room, then the same command resumes from the checkpoint before."
            )

    def alarms(self) -> dict[str, str]:
        """What a person must act on, by what it is about."""
        if not self._error:
            return {}
        return {
            f"save {self._failed}": f"saving failed {self._failed} times in a row ({self._error}); "
            "make room or mend the disk: it is tried again, until config.train.max_failed_saves="
            f"{self._max_failed} failures in a row end the run."
        }

    def _wait(self) -> bool:
        """Waits for the save in the background; returns whether the last one came through."""
        if self._writing is not None:
            try:
                self._keeper.wait()
            except Exception as error:
                self._note(error)
            else:
                self._on_disk, self._writing = self._writing, None
                self._failed, self._error, self._retry_at = 0, "", math.inf
        return not self._error

    def _note(self, error: Exception) -> None:
        if isinstance(error, UserError) or jax.process_count() > 1:
            raise error
        self._keeper.abandon()
        self._stop.saved, self._stop.unsaved = self._on_disk, True
        self._writing = None
        self._failed += 1
        self._error = " ".join(str(error).split())[:300]
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if self._failed >= self._max_failed:
            raise UserError(
                f"saving failed {self._failed} times in a row (config.train.max_failed_saves), at "
                f"last because of: {self._error}; make room or mend the disk, then the same "
                "command resumes from the newest checkpoint."
            ) from error

    def _came_through(self) -> bool:
        """Whether the save in the background did; for a thread that is about to end the process."""
        try:
            self._keeper.wait()
        except Exception:  # the run itself finds out, says so and tries again
            return False
        return True
