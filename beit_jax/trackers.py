"""Where else the numbers and pictures of a run go, if wanted: Weights & Biases and MLflow.

Both are extras. A run that resumes goes on under the id that it began with, which is kept
in trackers.json in its folder. metrics.jsonl stays the truth: where a killed run is resumed, these
may show its last updates twice.
"""

import importlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

import jax
from flax.traverse_util import flatten_dict

from beit_jax import metrics
from beit_jax.errors import UserError

IDS = "trackers.json"
EXPERIMENT = "beit_jax"  # of MLflow, which groups runs by it
LONGEST = 500  # characters of a config's value that MLflow keeps


class Tracker(Protocol):
    """What each of them can do."""

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        """Shows finite numbers of update `step`."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Shows the picture that lies at `path`."""

    def close(self) -> None: ...


def open_trackers(config, run: Path) -> list[Tracker]:
    """What `config.log` names, for the run in a folder; none but on process 0.

    Raises:
      UserError: for a package that is not installed, and where its service cannot be used.
    """
    if jax.process_index() != 0:
        return []
    found: list[Tracker] = []
    if config.log.wandb:
        found.append(WeightsAndBiases(config.log.wandb, run, config.to_dict()))
    if config.log.mlflow:
        found.append(MLflow(config.log.mlflow, run, config.to_dict()))
    return found


class WeightsAndBiases:
    """A run of a project, at wandb.ai or, with WANDB_MODE=offline, in files below the folder.

    Source: docs.wandb.ai, `wandb.init` and `Run.define_metric`.
    """

    def __init__(self, project: str, run: Path, config: dict):
        self._wandb = _package("wandb", f"config.log.wandb={project!r}")
        number = _id(run, "wandb", lambda: uuid.uuid4().hex[:8])
        try:
            self._run = self._wandb.init(
                project=project, dir=str(run), id=number, name=run.name, resume="allow",
                config=config,
            )  # fmt: skip
        except self._wandb.errors.Error as error:
            raise UserError(f"config.log.wandb={project!r} cannot be used: {error}") from error
        # Its own steps may only rise, which those of a resumed run do not.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        self._run.log({"update": step} | {f"{split}/{k}": v for k, v in numbers.items()})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"update": step, f"pictures/{name}": self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment `beit_jax` at a tracking URI, which is mostly a server's.

    Source: mlflow.org, `mlflow.MlflowClient`.
    """

    def __init__(self, uri: str, run: Path, config: dict):
        mlflow = _package("mlflow", f"config.log.mlflow={uri!r}")
        self._entities = mlflow.entities
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._id = _id(run, "mlflow", lambda: self._create(run, config))
            self._client.update_run(self._id, status="RUNNING")
        except mlflow.exceptions.MlflowException as error:
            raise UserError(f"config.log.mlflow={uri!r} cannot be used: {error}") from error

    def _create(self, run: Path, config: dict) -> str:
        """Starts a run with the config as its parameters; returns its id."""
        known = self._client.get_experiment_by_name(EXPERIMENT)
        number = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        created = self._client.create_run(number, run_name=run.name).info.run_id
        values = flatten_dict(config, sep=".").items()
        params = [self._entities.Param(key, str(value)[:LONGEST]) for key, value in values]
        for start in range(0, len(params), 100):  # which is all that it takes at once
            self._client.log_batch(created, params=params[start : start + 100])
        return created

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        found = [
            self._entities.Metric(f"{split}/{_plain(name)}", value, now, step)
            for name, value in numbers.items()
        ]
        for start in range(0, len(found), 1000):
            self._client.log_batch(self._id, metrics=found[start : start + 1000])

    def picture(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._id, str(path), "pictures")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _plain(name: str) -> str:
    """A metric's name in the letters that MLflow knows."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in name)


def _package(name: str, wanted_by: str) -> ModuleType:
    """An extra's package, which need not be installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{wanted_by} needs the package {name}, which is not installed; install it with "
            f"pip install {name}, or leave the key empty."
        ) from error


def _id(run: Path, tracker: str, create: Callable[[], str]) -> str:
    """The id under which a tracker knows this run: the one that it began with, or a new one."""
    path = run / IDS
    try:
        ids = json.loads(path.read_text()) if path.is_file() else {}
        known = ids.keys()
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged; restore it, or delete it to begin under another id."
        ) from error
    if tracker not in known:
        ids[tracker] = create()
        metrics.write_atomically(path, json.dumps(ids) + "\n")
    return ids[tracker]
