"""The data that a run was started with: data.json in its folder, so that others are noticed.

Where the order of the examples changes, a run that goes on sees some images twice and others never,
and its numbers mean something else. Names, labels and number tell; no image is read for it, so one
that was replaced under its own name is not noticed.
"""

import json
from pathlib import Path

import jax

from beit_jax import metrics
from beit_jax.data.record import Source
from beit_jax.errors import UserError

FILE = "data.json"


def keep(run: Path, source: Source, *, resuming: bool) -> None:
    """Writes what the training data are; raises UserError where a run resumes with others."""
    if jax.process_index() != 0:
        return
    path, now = run / FILE, describe(source)
    if resuming and path.exists():
        try:
            changes = _changes(json.loads(path.read_text()), now)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to go on.") from error
        if changes:
            raise UserError(
                f"the training data of {run} have changed since it was started: {changes}; bring "
                "the old ones back, start in a new --workdir, or give --force to go on with these."
            )
    metrics.write_atomically(path, json.dumps(now, indent=2) + "\n")


def describe(source: Source) -> dict:
    """What `keep` writes and compares."""
    return {
        "examples": len(source),
        "classes": list(source.class_names),
        "masks": None if source.mask_classes is None else list(source.mask_classes),
        "fingerprint": source.fingerprint,
        "description": source.description,  # for a person; a folder that was moved is the same
    }


def _changes(before: dict, now: dict) -> str:
    """What differs, in words; empty where nothing does."""
    found = []
    if before["examples"] != now["examples"]:
        found.append(f"{now['examples']:,} examples in place of {before['examples']:,}")
    for key, name in (("classes", "class"), ("masks", "class of label maps")):
        old, new = before[key] or [], now[key] or []
        gone, come = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        for names, what in ((gone, "is gone"), (come, "is new")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                found.append(f"{name} {names[0]!r}{more} {what}")
        if old != new and not gone and not come:
            found.append(f"the order of the {len(new)} {name} names")
    if before["fingerprint"] != now["fingerprint"] and not found:
        found.append(f"other names or labels among as many examples ({now['description']})")
    return ", ".join(found)
