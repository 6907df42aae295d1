"""Measuring in turns."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def starts() -> int:
    """How often a turn starts a device's program before it waits.

    An accelerator is at one while the host starts the next, as in training.
    """
    return 1 if jax.default_backend() == "cpu" else 10


def in_turns(programs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each program, by name: each runs twice in every turn, and the second run counts.

    The first finds memory and caches as another program has left them, or compiles. In training an
    update follows upon an update.

    Args:
      programs: name -> function that returns when its work is done.
      repeats: turns.
    """
    found = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            program()
            found[name].append(seconds(program))
    return found


def seconds(program: Callable[[], object]) -> float:
    """How long a program takes this once."""
    started = time.perf_counter()
    program()
    return time.perf_counter() - started


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median over the turns of how many times as long the first took."""
    return statistics.median(s / f for s, f in zip(slower, faster, strict=True))
