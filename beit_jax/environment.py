"""Where and with what a run was started: environment.jsonl in its folder, a line for each start.

What a person needs to have a run once more, or to see why two differ: machine, devices, versions of
the libraries, commit of the code, and the command as it was typed.
"""

import datetime
import importlib.metadata
import json
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import jax

from beit_jax import metrics

FILE = "environment.jsonl"
LIBRARIES = ("beit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
ROOT = Path(__file__).parents[1]  # of a clone


def note(run: Path, mode: str, step: int, *, parameters: int) -> None:
    """Adds this start, in `mode` at update `step`; process 0 does.

    `parameters` counts the numbers that the run trains.
    """
    if jax.process_index() == 0:
        line = {"mode": mode, "step": step, "parameters": parameters, **describe()}
        with open(run / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def describe() -> dict[str, object]:
    """This process's surroundings, as JSON knows them."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "time": now.isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "commit": _commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
    }


def read(run: Path) -> list[dict]:
    """All starts of a run, the first one first; none of a run that is older than the file."""
    return metrics.read_lines(run / FILE) if (run / FILE).is_file() else []


def _version(library: str) -> str | None:
    """The version installed; None where there is none, as of beit_jax in a clone used as it is."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The clone's commit, `-dirty` where files differ from it; None where it is no clone."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a slow file server
        return None
    return found.stdout.strip() if found.returncode == 0 else None
