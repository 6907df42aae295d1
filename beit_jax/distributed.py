"""Several processes, one run: they start together, agree on what they run, and end together.

Left alone, JAX waits five minutes for a process that never comes, a process that fell back to the
CPU holds up all others, and one that failed waits on its way out for those that wait for it. Here a
deadline, a comparison and a watching thread answer each of these within a minute, in one sentence.
What no Python can answer, a process that was killed, ends the others after the heartbeat's timeout,
inside JAX; the launchers say then which one it was.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed as internals  # the key-value store has no public name

from beit_jax.errors import UserError

POLL_SECONDS = 1.0
FAILED = "beit_jax/failed/"  # in the key-value store: process -> why it failed
STARTED = "beit_jax/started/"  # process -> what it runs, and on what
ANOTHER_FAILED = 134  # exit status: that of JAX's own abort after it has lost a process
_ending = threading.Event()  # no need to watch any more: the others know why this process ends


def start(
    coordinator: str | None,
    processes: int | None,
    number: int | None,
    *,
    start_timeout: int,
    heartbeat_timeout: int,
) -> None:
    """Joins the other processes: by the arguments, or as JAX finds them by itself.

    Args:
      coordinator: host:port of process 0; None asks Slurm, Open MPI or the TPU's metadata, and
        starts this process alone where these know of no other.
      processes: how many there are; None as above.
      number: which one this is, from 0; None as above.
      start_timeout: seconds until all must have come.
      heartbeat_timeout: seconds of silence after which a process counts as lost.

    Raises:
      UserError: for arguments that cannot work.
    """
    given = (coordinator, processes, number)
    if None in given and any(value is not None for value in given):
        raise UserError("--coordinator, --num_processes and --process_id go together; give all.")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} must be host:port; add the port.")
    if coordinator is not None and not 0 <= number < processes:
        raise UserError(f"--process_id={number} must be from 0 to --num_processes={processes} - 1.")
    if start_timeout <= 0 or heartbeat_timeout <= 0:
        raise UserError(
            "config.mesh.start_timeout and config.mesh.heartbeat_timeout must be above 0 seconds."
        )
    if coordinator is None and not _launched_together():
        return
    with _deadline(start_timeout, lambda: _not_all_came(start_timeout)):
        try:
            jax.distributed.initialize(
                *given,
                # At its own timeout JAX aborts before anything could be said.
                initialization_timeout=start_timeout + 60,
                heartbeat_timeout_seconds=heartbeat_timeout,
            )
        except ValueError:
            if coordinator is None:  # a TPU's library, but no TPU
                return
            raise
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"process 0 cannot listen at {internals.global_state.coordinator_address}; is the "
                "port taken by another run?"
            ) from error
    watching = threading.Thread(target=_watch, args=(internals.global_state.client,), daemon=True)
    watching.start()
    # Runs before JAX's own leaving, after which nothing is left to be asked.
    atexit.register(lambda: (_ending.set(), watching.join()))


def agree(facts: dict[str, object], timeout: int) -> None:
    """Returns once all processes have shown that they run the same, on devices of one kind.

    Args:
      facts: what must be the same in all processes, as JSON knows it.
      timeout: seconds until all must have their devices ready.

    Raises:
      UserError: names a process that differs, and in what.
    """
    if alone():
        return
    client, number = internals.global_state.client, internals.global_state.process_id
    with _deadline(timeout, lambda: _not_all_ready(client, timeout)):
        shown = {
            "host": socket.gethostname(),
            "backend": jax.default_backend(),
            "devices": jax.local_device_count(),
            "jax": jax.__version__,
            **facts,
        }
        client.key_value_set(f"{STARTED}{number}", json.dumps(shown))
        client.wait_at_barrier("beit_jax/started", (timeout + 60) * 1000)
        notes = _read(client, STARTED)
    first = notes[0]
    for other, note in sorted(notes.items()):
        for key in dict.fromkeys([*first, *note]):
            ours, theirs = first.get(key, "nothing"), note.get(key, "nothing")
            if ours != theirs and key != "host":
                _ending.set()  # all see this, and each says so itself
                raise UserError(
                    f"process {other} ({note['host']}) has {key}={theirs}, but process 0 "
                    f"({first['host']}) has {ours}; start the same command on machines of one kind."
                )


def fail(error: BaseException, status: int) -> None:
    """Ends this process after an error, and with it the others; returns if it is alone.

    The usual way out waits for the others, who wait for this process's part of the next update.
    """
    if alone():
        return
    known = _ending.is_set()
    _ending.set()
    if not isinstance(error, UserError | KeyboardInterrupt):
        traceback.print_exception(error)
    number = internals.global_state.process_id
    try:
        if not known:
            reason = str(error) if isinstance(error, UserError) else repr(error)
            note = json.dumps({"host": socket.gethostname(), "reason": reason})
            internals.global_state.client.key_value_set(f"{FAILED}{number}", note)
        if number == 0:  # the store is here: the others read it first
            time.sleep(3 * POLL_SECONDS)
    finally:
        _leave(status)


def alone() -> bool:
    """Whether no other process takes part in this run."""
    return internals.global_state.client is None or internals.global_state.num_processes == 1


def _launched_together() -> bool:
    """Whether JAX may find other processes by itself; how to, it knows best."""
    # Slurm's batch script itself, or a task alone, must not be bound to the first of its GPUs.
    tasks = [os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    on_tpu = importlib.util.find_spec("libtpu") is not None and jax.config.jax_platforms != "cpu"
    return on_tpu or any(int(number) > 1 for number in tasks)


def _watch(client) -> None:
    """Ends this process soon after another one failed."""
    while not _ending.wait(POLL_SECONDS):
        try:
            failed = _read(client, FAILED)
        except jax.errors.JaxRuntimeError:
            if not _ending.is_set():
                _quit("error: process 0, where all meet, is gone; see there.", ANOTHER_FAILED)
            return
        for number, note in failed.items():
            if not _ending.is_set():
                sentence = f"process {number} ({note['host']}) failed: {note['reason']}"
                _quit(f"stopped, because {sentence}", ANOTHER_FAILED)


@contextlib.contextmanager
def _deadline(seconds: int, sentence: Callable[[], str]) -> Iterator[None]:
    """Ends the process if the block takes longer, also where it waits inside JAX."""
    timer = threading.Timer(seconds, lambda: _quit(sentence()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_all_came(seconds: int) -> str:
    state = internals.global_state
    place = f"process {state.process_id} of {state.num_processes} at {state.coordinator_address}"
    return (
        f"error: not all processes came together within {seconds} s (seen from {place}); look "
        "whether each was started and reaches that address, or wait longer with "
        "--config.mesh.start_timeout=SECONDS."
    )


def _not_all_ready(client, seconds: int) -> str:
    notes = _read(client, STARTED)
    ready = [
        f"process {number} ({note['host']}) has {note['devices']} of {note['backend']}"
        for number, note in sorted(notes.items())
    ]
    missing = [str(n) for n in range(internals.global_state.num_processes) if n not in notes]
    return (
        f"error: not all processes had their devices ready within {seconds} s: "
        f"{', '.join(ready) or 'none has'}, nothing from {', '.join(missing)}; a process that "
        "fell back to the CPU, or whose devices are taken, holds up the others."
    )


def _read(client, prefix: str) -> dict[int, dict]:
    """The notes of all processes that left one below `prefix`."""
    found = client.key_value_dir_get(prefix)
    return {int(key.rsplit("/", 1)[1]): json.loads(note) for key, note in found}


def _quit(sentence: str, status: int = 1) -> None:
    print(sentence, file=sys.stderr)
    _leave(status)


def _leave(status: int) -> None:
    """Ends the process without waiting for anyone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
