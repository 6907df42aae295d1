"""Processes to be killed, as often as a test likes.

A process is forked off a server that has imported everything already, so that a start takes two
seconds, not eight: what is killed is the run, from opening its folder to its last checkpoint.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import tiny

from beit_jax import lock, main, preemption


def start(function: Callable, folder: Path, *arguments) -> multiprocessing.Process:
    """Calls a function of this module in a process of its own, on one device, in `folder`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    process = server.Process(target=_begin, args=(function, folder, *arguments))
    process.start()
    return process


def _begin(function: Callable, folder: Path, *arguments) -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    # Read when the devices are first asked for, which is only now.
    os.environ.update(tiny.on_devices(1))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    function(folder, *arguments)


def train(folder: Path) -> None:
    """Trains in `folder`, whose config.json says what, as the command line does."""
    sys.argv = ["beit_jax.main", f"--workdir={folder}"]
    main.command()


def inside_xla(folder: Path, unsaved: bool) -> None:
    """Does not come back to Python, where it would hear a signal."""
    stop = preemption.Stop()
    stop.saved, stop.unsaved = 7, unsaved
    forever = jax.jit(lambda x: jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 9, x))
    with stop.listening():
        (folder / "ready").touch()
        forever(0).block_until_ready()


def hold_lock(folder: Path) -> None:
    """Trains in `folder`, as far as others can tell."""
    with lock.held(folder):
        (folder / "ready").touch()
        time.sleep(600)
