"""Networks that a run reads and never trains: its own copies of them.

A copy is the folder `frozen/<kind>/` of a run, with weights, hash, source and the config of the run
that made them, so that a run resumes and evaluates by itself. A copy of a network that needs
another holds a copy of that one in turn, in the same place.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from beit_jax import checkpoint, stored_config
from beit_jax.checkpoint import Weights
from beit_jax.errors import UserError

# Tasks whose weights mean something only with a network that the run read, and its kind.
PARTS = {"pixel_decoder": "tokenizer"}


def frozen_network(
    run: Path, kind: str, path: str, make: Callable[[Weights, str], Any], advice: str
) -> tuple[Any, dict[str, Weights]]:
    """What `make` makes of a frozen network, from the run's own copy if there is one.

    Nothing is written: training calls `keep`, an evaluation leaves the run as it is.

    Args:
      run: the run's folder, which may hold a copy.
      kind: "tokenizer" or "teacher"; the path is `config.<kind>.path`.
      path: another run's folder; "" where the copy is enough.
      make: `(weights, the key that named them) -> network`; refuses what cannot serve.
      advice: the rest of the sentence where neither a copy nor a path is there.

    Returns:
      the network, and what `keep` is to keep of it: {kind: weights}, empty where there is a copy.

    Raises:
      UserError: for no network, one that `make` refuses, and a path to another than the copy's.
    """
    folder, named = run / "frozen" / kind, f"config.{kind}.path"
    weights = load(folder)
    if weights is None:
        if not path:
            raise UserError(f"{named} is empty: {advice}")
        weights = read(path, named)
        return make(weights, named), {kind: weights}
    if path and Path(path).exists() and Path(path).resolve() not in Path(weights.source).parents:
        raise UserError(
            f"{run} holds the {kind} of {weights.source}, but {named}={path} names another; give "
            "a new --workdir, or the old path."
        )
    return make(weights, named), {}


def read(path: str, named: str) -> Weights:
    """A run's weights, with the frozen networks that they need; see `checkpoint.load_weights`."""
    weights = checkpoint.load_weights(path, named)
    return _with_parts(weights, weights.run)


def keep(run: Path, copies: Mapping[str, Weights]) -> None:
    """Keeps networks by kind, so that the run needs nothing outside its folder."""
    for kind, weights in copies.items():
        save(run / "frozen" / kind, weights)


def save(folder: Path, weights: Weights) -> None:
    """Writes a copy of a frozen network."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "variables").resolve(), weights.variables, force=True)
    keep(folder, weights.parts)
    if jax.process_index() == 0:  # written last: its presence says that the copy is whole
        (folder / "source.json").write_text(
            json.dumps(
                {"source": weights.source, "sha256": weights.digest, "config": weights.config},
                indent=2,
            )
        )


def load(folder: Path) -> Weights | None:
    """Reads a frozen network back, or None if the run holds none."""
    if not (folder / "source.json").is_file():
        return None
    path = folder / "source.json"
    about = json.loads(path.read_text(), object_hook=stored_config.tuples)
    variables = checkpoint.read_tree(folder.resolve() / "variables")
    if checkpoint.digest(variables) != about["sha256"]:
        raise UserError(f"{folder} is damaged: its weights do not match the hash in source.json.")
    params = variables.pop("params")
    config = stored_config.completed(about["config"], path)
    found = Weights(params, variables, config, about["source"], about["sha256"])
    return _with_parts(found, folder)


def _with_parts(weights: Weights, folder: Path) -> Weights:
    """Weights with the frozen networks that they need, whose copies lie in `folder`."""
    if weights.config["task"] not in PARTS:
        return weights
    kind = PARTS[weights.config["task"]]
    part = load(folder / "frozen" / kind)
    if part is None:
        raise UserError(f"{folder} lacks frozen/{kind}; copy the whole folder of the run again.")
    return weights._replace(parts={kind: part})
