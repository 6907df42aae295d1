"""Checkpoints that are not whole: files lost or cut short by a crash, a full disk or a copy."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from beit_jax.errors import UserError

LIST = "_CHECKPOINT_METADATA"  # which Orbax writes: what a checkpoint consists of


class Damaged(Exception):
    """This checkpoint is not whole; the message is the reason."""


def first_whole(
    newest_first: Iterable[Path], read: Callable[[Path], Any], named: str
) -> tuple[Any, dict[Path, str]]:
    """What `read` makes of the first checkpoint that it can read.

    Args:
      newest_first: folders of checkpoints, at least one.
      read: raises UserError for one that is whole and does not fit.
      named: where they lie, for the error sentence.

    Returns:
      that, and the checkpoints passed over: {folder: why}.

    Raises:
      UserError: all are damaged; or the newest is, and several processes would each have to find
        that out alike.
    """
    damaged: dict[Path, str] = {}
    for folder in newest_first:
        try:
            _check_parts(folder)
            return read(folder), damaged
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise what they like
            damaged[folder] = " ".join((str(error) or repr(error)).split())[:100]
            # All see which files are there, but only some read the part that is broken.
            if jax.process_count() > 1 and not isinstance(error, Damaged):
                raise UserError(
                    f"{folder} cannot be read ({damaged[folder]}); move it away, then the same "
                    "command takes the checkpoint before it."
                ) from error
    first, why = next(iter(damaged.items()))
    raise UserError(
        f"{named} holds no checkpoint that can be read, the newest is {first} ({why}); restore one "
        "from a copy, or delete them all to start anew."
    )


def sentence(damaged: dict[Path, str]) -> str:
    """Says what was passed over; empty where nothing was."""
    if not damaged:
        return ""
    those = ", ".join(f"{folder} ({why})" for folder, why in damaged.items())
    return f"passed over what is damaged: {those}"


def move_away(checkpoint: Path, run: Path) -> None:
    """Moves a damaged checkpoint to the run's folder damaged/, where it is in nobody's way."""
    folder = run / "damaged"
    folder.mkdir(exist_ok=True)
    number = sum(path.name.split("_")[0] == checkpoint.name for path in folder.iterdir())
    checkpoint.rename(folder / f"{checkpoint.name}_{number}")


def _check_parts(checkpoint: Path) -> None:
    """Raises Damaged where a part is missing that the checkpoint's own list has."""
    try:
        parts = json.loads((checkpoint / LIST).read_text())["item_handlers"]
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"{LIST} is lost or broken: {error}") from error
    if lost := [name for name in parts if not (checkpoint / name).is_dir()]:
        raise Damaged(f"{' and '.join(lost)} lost")
