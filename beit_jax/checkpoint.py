"""Orbax checkpoints: saving and resuming a run, reading another run's weights.

A checkpoint is a folder `checkpoints/<step>/` of separate items (params, ema_params, model_state,
opt_state, progress), so that a later stage can read the weights alone.
"""

import contextlib
import errno
import hashlib
import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from beit_jax import damage, metrics, retention
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
        self._run, self._keep, self._read_only = run, keep, read_only
        self._best = retention.Best(best, maximize, metrics.evaluations(run))
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        newest = checkpoint_managers.LatestN(self._keep)
        return _Manager(
            (self._run / "checkpoints").resolve(),  # Orbax refuses relative paths
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, self._best]),
                cleanup_tmp_directories=not self._read_only,  # what a killed save left behind
                read_only=self._read_only,
            ),
        )

    def latest(self) -> int | None:
        """The newest saved update, or None."""
        return self._manager.latest_step()

    def save(self, state) -> None:
        """Copies the state off the devices and writes it in the background."""
        self._manager = self._manager or self._open()
        items = {name: getattr(state, name) for name in TREES}
        self._check_room(items)
        items = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if _leaves(tree)}
        counters = {name: int(getattr(state, name)) for name in COUNTERS}
        # One update consumes one global batch, so the data position is the step.
        counters["batches"] = counters["step"]
        self._manager.save(
            counters["step"],
            args=ocp.args.Composite(progress=ocp.args.JsonSave(counters), **items),
        )

    def _check_room(self, items: PyTree) -> None:
        """Raises OSError where there is none, which costs less than finding out in the middle."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        total, _, free = shutil.disk_usage(self._run)
        if total and free < needed:  # some mounted buckets say that there is nothing at all
            said = f"a checkpoint takes {needed:,} bytes, and {free:,} are free"
            raise OSError(errno.ENOSPC, said, str(self._run))

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes how good a saved update is; raises UserError where the scores do not tell."""
        self._best.note(step, scores)

    def restore(self, abstract) -> tuple[Any, str]:
        """The newest state that is whole, laid out like `abstract` (shapes with shardings).

        Returns it, and what a person is told of checkpoints that are damaged. Training moves these
        out of the way, to the run's folder damaged/.
        """
        folder = Path(self._manager.directory)
        newest_first = [folder / str(step) for step in sorted(self._manager.all_steps())[::-1]]
        state, damaged = damage.first_whole(
            newest_first, lambda path: self._restore(path, abstract), str(self._run)
        )
        if damaged and not self._read_only:
            if jax.process_index() == 0:
                for path in damaged:
                    damage.move_away(path, self._run)
            multihost_utils.sync_global_devices("damaged checkpoints moved")
            self._manager.reload()
        return state, damage.sentence(damaged)

    def _restore(self, folder: Path, abstract):
        items = {
            name: ocp.args.StandardRestore(getattr(abstract, name))
            for name in TREES
            if _leaves(getattr(abstract, name))
        }
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
            int(folder.name), args=ocp.args.Composite(progress=ocp.args.JsonRestore(), **items)
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

    def saving(self) -> bool:
        """Whether a save is still being written in the background."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what kept it from that."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def abandon(self) -> None:
        """Forgets a save that failed, with all that Orbax remembers of it."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # which was said already
                manager.close()

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Orbax's, which leaves it to `preemption` to ask whether the run is to stop."""

    def reached_preemption(self, step: int) -> bool:
        return False


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
        run, checkpoints = folder.parent.parent, [folder] if folder.is_dir() else []
    else:
        run, checkpoints = folder, _newest_first(folder / "checkpoints")
    if not checkpoints or not (run / "config.json").is_file():
        raise UserError(
            f"{named}={path} holds no finished checkpoint (looked for config.json and "
            "checkpoints/<step>/ in it); train one first or name another run's folder."
        )
    config = read_config(run)
    weights, damaged = damage.first_whole(
        checkpoints, lambda checkpoint: _read_weights(checkpoint, config), f"{named}={path}"
    )
    if damaged:
        warnings.warn(damage.sentence(damaged), stacklevel=2)
    return weights


def _read_weights(checkpoint: Path, config: dict) -> Weights:
    item = "ema_params" if (checkpoint / "ema_params").is_dir() else "params"
    params, model_state = read_tree(checkpoint / item), {}
    if (checkpoint / "model_state").is_dir():
        model_state = read_tree(checkpoint / "model_state")
        model_state.pop(HISTORY, None)
    kind = "averaged weights" if item == "ema_params" else "weights"
    found = Weights(params, model_state, config, str(checkpoint), "", kind)
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


def any_in(run: Path) -> bool:
    """Whether a run's folder holds a checkpoint, whole or damaged."""
    return bool(_newest_first(run / "checkpoints"))


def _newest_first(checkpoints: Path) -> list[Path]:
    steps = [p for p in checkpoints.glob("*") if p.name.isdigit()]
    return sorted(steps, key=lambda p: int(p.name), reverse=True)


def _leaves(tree: PyTree) -> bool:
    return bool(jax.tree.leaves(tree))
