"""A run that is asked to stop: by Ctrl-C, by SIGTERM from a scheduler or a machine that goes.

It stops at the next point where nothing is lost: after an update, when its state is saved, or
between two batches of an evaluation or of k-means, since the state was saved before. Several
processes stop at the same point: JAX carries the news among them, and every process counts these
points alike.

Python hears a signal only when it is next at work itself, and may be minutes inside a compilation.
So a process alone has a thread that hears it at once, and ends the process as soon as nothing new
is to be saved.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

PATIENCE = 1.0  # seconds in which a run that can stop by itself has done so
STATUS = 130  # exit status of a run that was asked to stop, whichever way; launchers rely on it


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


class Stop:
    """Whether a run was asked to stop, and what would be lost if it did now."""

    def __init__(self):
        self.saved: int | None = None  # the update of the newest checkpoint
        self.unsaved = False  # whether there was an update since
        self.wait_for_save: Callable[[], bool] = lambda: True  # whether it is on disk now
        self._signal: int | None = None
        self._lock = threading.Lock()
        self._noticed = threading.Event()  # by the run itself, which then ends itself
        self._points = 0  # at which all processes asked

    def ask(self) -> None:
        """Asks as SIGTERM does, from within the process."""
        self._signal = signal.SIGTERM

    def requested(self) -> bool:
        """Whether to stop here; all processes ask equally often, and are answered alike."""
        if jax.process_count() > 1:
            self._points += 1
            return multihost_utils.reached_preemption_sync_point(self._points)
        with self._lock:
            if self._signal is not None:
                self._noticed.set()
            return self._noticed.is_set()

    def between(self, batches: Iterator) -> Iterator:
        """The batches, up to the request; raises Interrupted there, so nothing may be unsaved."""
        with contextlib.closing(batches):
            for batch in batches:
                if self.requested():
                    raise Interrupted(self.sentence())
                yield batch

    def sentence(self) -> str:
        """What a person is told at the end."""
        if self.saved is None:
            return "stopped before the first update; the same command starts again"
        return f"stopped at update {self.saved}, which is saved; the same command resumes there"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hears SIGINT and SIGTERM within the block; a second SIGINT raises KeyboardInterrupt.

        For the command line, which owns its process. Of several processes JAX hears SIGTERM.
        """
        if jax.process_count() > 1:
            yield
            return
        receiving, sending = os.pipe()
        os.set_blocking(sending, False)
        before = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
        handlers = {n: signal.signal(n, self._heard) for n in (signal.SIGINT, signal.SIGTERM)}
        watching = threading.Thread(target=self._watch, args=(receiving,), daemon=True)
        watching.start()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            self._noticed.set()  # from here on the process ends as it would
            os.close(sending)
            watching.join()
            os.close(receiving)

    def _heard(self, number: int, _frame) -> None:
        self._signal = number
        signal.signal(number, signal.default_int_handler)  # a second one stops at once

    def _watch(self, receiving: int) -> None:
        """Ends the process where the run has not noticed a signal and has nothing new to save."""
        heard = os.read(receiving, 1)
        if not heard:
            return
        self._signal = heard[0]  # also while Python's own handlers wait
        while not self._noticed.wait(PATIENCE):
            with self._lock:  # the run asks here too: one of the two ends it
                if self._noticed.is_set() or self.unsaved or not self.wait_for_save():
                    continue
                cursor = "\x1b[?25h" if sys.stdout.isatty() else ""  # which a progress bar hides
                print(f"{cursor}\n{self.sentence()}", file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(STATUS)
