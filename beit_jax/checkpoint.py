"""Orbax checkpoints: saving and resuming a run, reading another run's weights.

A checkpoint is a folder `checkpoints/<step>/` of separate items (params, ema_params, model_state,
opt_state, progress), so that a later stage can read the weights alone.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from beit_jax.errors import UserError
from beit_jax.stored_config import read_config

PyTree = Any
TREES = ("params", "ema_params", "model_state", "opt_state")
HISTORY = "history"  # the collection of model_state that is training's own: no network has it
COUNTERS = ("step", "skipped", "skipped_in_a_row")


class Keeper:
    """Saves a run's state while training goes on, and restores it on any number of devices."""

    def __init__(self, run: Path, *, keep: int, best: str, maximize: bool, read_only: bool = False):
        """Keeps the newest `keep` checkpoints and the one of the best evaluation metric `best`.

        `read_only` touches nothing, so that a run can be evaluated while it trains elsewhere.
        """
        self._best = best
        policies = checkpoint_managers
        self._manager = ocp.CheckpointManager(
            (run / "checkpoints").resolve(),  # Orbax refuses relative paths
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=lambda scores: scores[best],
                            reverse=not maximize,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                best_fn=lambda scores: scores[best],
                best_mode="max" if maximize else "min",
                cleanup_tmp_directories=not read_only,  # what a killed save left behind
                read_only=read_only,
            ),
        )

    def latest(self) -> int | None:
        """The newest saved update, or None."""
        return self._manager.latest_step()

    def save(self, state, scores: dict[str, float] | None) -> None:
        """Copies the state off the devices and writes it in the background."""
        if scores is not None and self._best not in scores:
            raise UserError(
                f"config.eval.best={self._best!r} is not among the evaluation metrics "
                f"({', '.join(sorted(scores))}); name one of them."
            )
        items = {name: getattr(state, name) for name in TREES}
        items = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if _leaves(tree)}
        counters = {name: int(getattr(state, name)) for name in COUNTERS}
        # One update consumes one global batch, so the data position is the step.
        counters["batches"] = counters["step"]
        self._manager.save(
            counters["step"],
            args=ocp.args.Composite(progress=ocp.args.JsonSave(counters), **items),
            metrics=scores,
        )

    def restore(self, abstract):
        """The newest state, laid out like `abstract` (a state of shapes with shardings)."""
        step = self._manager.latest_step()
        items = {
            name: ocp.args.StandardRestore(getattr(abstract, name))
            for name in TREES
            if _leaves(getattr(abstract, name))
        }
        folder = Path(self._manager.directory) / str(step)
        if missing := [name for name in items if not (folder / name).is_dir()]:
            raise UserError(
                f"{folder} holds no {' and no '.join(missing)}: imported weights and those of "
                "another recipe cannot be trained on in place; start a new --workdir from them "
                "with --config.init.path."
            )
        self._check_shapes(folder / "params", abstract.params)
        if "model_state" in items and HISTORY not in _shapes(folder / "model_state"):
            # Imported weights have none. They can be evaluated, which does without.
            state = {k: v for k, v in abstract.model_state.items() if k != HISTORY}
            items["model_state"] = ocp.args.StandardRestore(state)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(progress=ocp.args.JsonRestore(), **items)
        )
        counters = {
            name: jax.device_put(
                jnp.asarray(restored.progress[name], jnp.int32), getattr(abstract, name).sharding
            )
            for name in COUNTERS
        }
        return abstract._replace(**{name: restored[name] for name in items}, **counters)

    def _check_shapes(self, item: Path, params: PyTree) -> None:
        """Refuses weights of another network than the config describes."""
        found = flatten_dict(_shapes(item), sep="/")
        wanted = flatten_dict(params, sep="/")
        for name in [*wanted, *found]:
            ours, theirs = (
                tuple(leaf.shape) if (leaf := tree.get(name)) is not None else "missing"
                for tree in (wanted, found)
            )
            if ours != theirs:
                raise UserError(
                    f"{name} is {theirs} in {item.parent}, but {ours} in the network that the "
                    "config and the data (its number of classes, its tokenizer) ask for: give "
                    "those that the weights were made with."
                )

    def reached_preemption(self, step: int) -> bool:
        """Whether any host was told to stop; all hosts answer alike."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


class Weights(NamedTuple):
    """A network read from a run's folder."""

    params: PyTree  # NumPy arrays
    model_state: PyTree  # what the network keeps beside them, such as a codebook; {} for most
    config: dict  # the whole resolved config of the run that trained it
    source: str  # the checkpoint's path
    digest: str  # SHA-256 of both
    kind: str = "weights"  # or "averaged weights"
    parts: dict = {}  # by kind, the frozen networks without which these weights mean nothing

    @property
    def variables(self) -> dict:
        """All collections of the network, for `apply`."""
        return {"params": self.params, **self.model_state}

    @property
    def run(self) -> Path:
        """The folder of the run that they were read from."""
        return Path(self.source).parents[1]


def load_weights(path: str, named: str) -> Weights:
    """Reads the averaged weights where kept, else the plain ones, as NumPy arrays.

    Args:
      path: a run's folder (its newest checkpoint) or one of its `checkpoints/<step>` folders.
      named: who named `path`, such as "config.init.path", for the error sentence.
    """
    folder = Path(path).expanduser().resolve()
    if folder.parent.name == "checkpoints":
        run, checkpoint = folder.parent.parent, folder
    else:
        run, checkpoint = folder, _newest(folder / "checkpoints")
    if checkpoint is None or not checkpoint.is_dir() or not (run / "config.json").is_file():
        raise UserError(
            f"{named}={path} holds no finished checkpoint (looked for config.json and "
            "checkpoints/<step>/ in it); train one first or name another run's folder."
        )
    item = "ema_params" if (checkpoint / "ema_params").is_dir() else "params"
    params, model_state = read_tree(checkpoint / item), {}
    if (checkpoint / "model_state").is_dir():
        model_state = read_tree(checkpoint / "model_state")
        model_state.pop(HISTORY, None)
    kind = "averaged weights" if item == "ema_params" else "weights"
    found = Weights(params, model_state, read_config(run), str(checkpoint), "", kind)
    return found._replace(digest=digest(found.variables))


def save_weights(run: Path, variables: dict) -> None:
    """Writes weights as the checkpoint of a run before its first update; `variables` is emptied.

    Larger weights than half the memory can be written: they are neither copied whole nor kept in
    a buffer until the end, as the checkpoints of a training are.

    Args:
      run: the run's folder.
      variables: collection -> tree of NumPy arrays; "params", and whatever else there is.
    """
    items = {"params": variables.pop("params"), "model_state": variables}
    items = {name: _on_device(tree) for name, tree in items.items() if _leaves(tree)}
    # Files of their own an array, written with at most 1 GB on the way.
    handler = partial(ocp.PyTreeCheckpointHandler, save_concurrent_gb=1, use_ocdbt=False)
    handlers = {name: handler() for name in items} | {"progress": ocp.JsonCheckpointHandler()}
    counters = dict.fromkeys((*COUNTERS, "batches"), 0)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(
            (run / "checkpoints" / "0").resolve(),
            args=ocp.args.Composite(
                progress=ocp.args.JsonSave(counters),
                **{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()},
            ),
        )


def _on_device(tree: dict) -> dict:
    """Moves arrays to a device one at a time, so that none is there twice."""
    flat = flatten_dict(tree)
    tree.clear()
    return unflatten_dict({path: jnp.asarray(flat.pop(path)) for path in list(flat)})


def digest(params: PyTree) -> str:
    """SHA-256 over names, shapes and bytes of all parameters."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()


def read_tree(path: Path) -> PyTree:
    """Reads one item of a checkpoint, such as its params, as NumPy arrays."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _shapes(path))
        return checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=args))


def _shapes(path: Path) -> PyTree:
    """What one item of a checkpoint holds, without reading it: leaves have `shape`."""
    # The handler itself, since a checkpointer warns of metadata that only whole steps have.
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree


def _newest(checkpoints: Path) -> Path | None:
    steps = [p for p in checkpoints.glob("*") if p.name.isdigit()]
    return max(steps, key=lambda p: int(p.name), default=None)


def _leaves(tree: PyTree) -> bool:
    return bool(jax.tree.leaves(tree))
