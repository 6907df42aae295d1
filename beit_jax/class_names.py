"""The names of the classes that a run tells apart: classes.txt in its folder, one a line.

They stand in the order of the head's outputs. Training writes them, and importing where the foreign
files know them; an imported run without the file has classes that are numbers to it.
"""

from pathlib import Path

import jax

from beit_jax import metrics
from beit_jax.data.record import Source
from beit_jax.errors import UserError

FILE = "classes.txt"


def keep(run: Path, names: tuple[str, ...]) -> None:
    """Writes the names of a run that has any; process 0 does."""
    if names and jax.process_index() == 0:
        metrics.write_atomically(run / FILE, "".join(f"{line}\n" for line in map(_line, names)))


def read(run: Path) -> tuple[str, ...]:
    """The run's class names; empty where it has no such file."""
    path = run / FILE
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); mend or delete it.") from error


def refuse_fewer_than_two(config, names: tuple[str, ...]) -> None:
    """Refuses data without labels, and of one class, which often lie a folder further down."""
    if len(names) < 2:
        there = f"the one class {names[0]!r}" if names else "no labels"
        raise UserError(
            f"config.data.source={config.data.source} has {there}, and task {config.task} needs "
            "two classes or more: name the folder that holds one sub-folder of images a class, or "
            "a labelled TFDS dataset."
        )


def check(run: Path, source: Source, names: tuple[str, ...]) -> None:
    """Refuses data with other classes, called `names`, than those that the run's head has learnt.

    A head knows its outputs by their number alone, so a class more or less, or another order, would
    silently be taken for others.
    """
    known, found = read(run), tuple(map(_line, names))
    if not known or known == found:
        return
    here, there = (f"{len(names):,} classes ({_listed(names)})" for names in (known, found))
    mended = "take images of the same classes"
    if len(known) == len(found):
        first = next(i for i in range(len(known)) if known[i] != found[i])
        here, there = f"{known[first]!r} as class {first}", f"{found[first]!r} in its place"
        mended += f", or correct {FILE} there if the two mean the same throughout"
    raise UserError(f"{run} has learnt {here}, but {source.description} has {there}: {mended}.")


def _line(name: str) -> str:
    """A name as the file holds it: on one line, and UTF-8 whatever a folder's name is made of."""
    return " ".join(name.split()).encode(errors="backslashreplace").decode()


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3) if names else "no labels"
