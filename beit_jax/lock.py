"""One training a folder: two would overwrite each other's checkpoints and numbers."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from beit_jax.errors import UserError

FILE = "lock"


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Makes the run's folder and holds it for this training; process 0 does, for all.

    The system gives the lock back however the process ends, so that one that was killed leaves
    nothing in the way; the file stays. Between machines it holds where the file system has locks:
    NFS since version 4, Lustre with -o flock, but no mounted bucket.

    Raises:
      UserError: another training holds it, or the folder cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / FILE, "a+")
    except OSError as error:
        raise UserError(
            f"--workdir={run} cannot be written ({error.strerror}); name another folder."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # has no locks
                file.seek(0)
                raise UserError(
                    f"{run} is being trained already, by {file.read().strip() or 'another'}; wait "
                    "for it, stop it, or give another --workdir."
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
