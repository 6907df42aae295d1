"""Paths that a person gives."""

import os
from pathlib import Path

from beit_jax.errors import UserError


def local_path(path: str) -> Path:
    """A path of this machine, absolute; raises UserError where it is an address such as gs://."""
    if "://" in path:
        raise UserError(
            f"{path} is an address where a folder is needed: mount the bucket (`gcsfuse "
            "--implicit-dirs BUCKET FOLDER` for Google Cloud Storage) and name its folder."
        )
    return Path(os.path.expanduser(path)).absolute()
