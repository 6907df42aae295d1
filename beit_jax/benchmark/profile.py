"""Where the time of one compiled program goes, by the part of the model that asked for it."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData

# An instruction of the compiled program, and the Python scopes that it stems from.
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
_WRAPPER = re.compile(r"^(?:jit|jvp|transpose|vmap|rematted_computation|checkpoint)\((.*)\)$")
OTHER = "other"


def part_shares(program: Callable[[], object], hlo: str, parts: tuple[str, ...]) -> dict:
    """Shares of a program's device time by part, from the profiler; they add up to 1.

    A fusion counts for the operation it ends in, so neighbours may trade a few percent.

    Args:
      program: runs it once and returns when it is done.
      hlo: `compiled.as_text()` of it.
      parts: scopes to look for, such as a module's name; the first in an operation's path counts.
    """
    scopes = dict(_INSTRUCTION.findall(hlo))
    totals = dict.fromkeys((*parts, OTHER), 0.0)
    for name, nanoseconds in _instruction_times(program).items():
        path = scopes[name].split("/") if name in scopes else ()
        found = (part for scope in path if (part := _unwrapped(scope)) in parts)
        totals[next(found, OTHER)] += nanoseconds
    whole = sum(totals.values())
    return {part: total / whole for part, total in totals.items()} if whole else {}


def _unwrapped(scope: str) -> str:
    while match := _WRAPPER.match(scope):
        scope = match.group(1)
    return scope


def _instruction_times(program: Callable[[], object]) -> collections.Counter:
    """Nanoseconds by instruction, over all devices."""
    times = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            program()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    for event in line.events:
                        name = dict(event.stats).get("hlo_op")
                        # The CPU's runtime also marks where an instruction ends.
                        if name and not event.name.startswith("end: "):
                            times[name] += event.duration_ns
    return times
