"""Trackers get what metrics.jsonl gets, under one id for ever.

Where Weights & Biases or MLflow are not installed, a stand-in takes the calls.
"""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import tiny

from beit_jax import metrics, trackers
from beit_jax.errors import UserError

VALUES = {"loss": 0.5, "IoU/wall, brick": 0.25, "accuracy": float("nan")}


def fake_wandb(monkeypatch) -> list:
    """A stand-in that remembers what it was told."""
    told = []

    class Run:
        def define_metric(self, *args, **settings):
            told.append(("define_metric", args, settings))

        def log(self, values):
            told.append(("log", values))

        def finish(self):
            told.append(("finish",))

    def init(**settings):
        told.append(("init", settings))
        return Run()

    errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    module = types.SimpleNamespace(init=init, errors=errors, Image=lambda path: ("image", path))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


class FakeClient:
    """As much of mlflow.MlflowClient as is used, in memory."""

    runs: dict[str, dict] = {}

    def __init__(self, tracking_uri):
        if tracking_uri.startswith("nowhere"):
            raise FakeMlflow.exceptions.MlflowException("no such store")

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id="1") if self.runs else None

    def create_experiment(self, name):
        return "1"

    def create_run(self, experiment, run_name):
        self.runs[f"run{len(self.runs)}"] = {"params": {}, "metrics": [], "artifacts": []}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=[*self.runs][-1]))

    def update_run(self, run, status):
        self.runs[run]["status"] = status

    def set_terminated(self, run):
        self.runs[run]["status"] = "FINISHED"

    def log_batch(self, run, metrics=(), params=()):
        self.runs[run]["params"] |= {param.key: param.value for param in params}
        self.runs[run]["metrics"] += metrics

    def log_artifact(self, run, path, folder):
        self.runs[run]["artifacts"].append(path)

    def get_metric_history(self, run, name):
        return [metric for metric in self.runs[run]["metrics"] if metric.key == name]

    def get_run(self, run):
        found = self.runs[run]
        return types.SimpleNamespace(
            info=types.SimpleNamespace(status=found["status"]),
            data=types.SimpleNamespace(params=found["params"]),
        )

    def list_artifacts(self, run, folder):
        return self.runs[run]["artifacts"]


class _Entity(types.SimpleNamespace):
    def __init__(self, key, value, timestamp=0, step=0):
        super().__init__(key=key, value=value, timestamp=timestamp, step=step)


class FakeMlflow:
    MlflowClient = FakeClient
    entities = types.SimpleNamespace(Param=_Entity, Metric=_Entity)
    exceptions = types.SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))


@pytest.fixture
def mlflow(monkeypatch):
    """The package, or its stand-in; its store is a folder, as a server would need its full form."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if importlib.util.find_spec("mlflow") is None:
        monkeypatch.setitem(sys.modules, "mlflow", FakeMlflow)
        FakeClient.runs.clear()
    return sys.modules.get("mlflow") or importlib.import_module("mlflow")


def write(tree, run, step: int) -> None:
    """One start of a run that writes a line and a picture."""
    writer = metrics.Writer(run, step - 1, trackers.open_trackers(tree, run))
    writer.scalars(step, "train", VALUES)
    writer.pictures(step, {"codes": np.zeros((4, 6, 3), np.uint8)})
    writer.close()


def test_mlflow_goes_on_under_the_same_id(tmp_path, mlflow):
    uri = f"file:{tmp_path / 'store'}"
    tree = tiny.config("dvae", log__mlflow=uri)
    (tmp_path / "run").mkdir()
    for step in (1, 2):  # a start, and a resume
        write(tree, tmp_path / "run", step)
    number = json.loads((tmp_path / "run" / trackers.IDS).read_text())["mlflow"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    history = client.get_metric_history(number, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.5)]
    assert len(client.get_metric_history(number, "train/IoU/wall_ brick")) == 2
    assert not client.get_metric_history(number, "train/accuracy")  # a number that is none
    found = client.get_run(number)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.batch_size"] == "16"
    assert len(client.list_artifacts(number, "pictures")) == 2


def test_mlflow_that_cannot_be_used(tmp_path, mlflow):
    with pytest.raises(UserError, match="config.log.mlflow='nowhere://x' cannot be used"):
        trackers.open_trackers(tiny.config("dvae", log__mlflow="nowhere://x"), tmp_path)


def test_wandb_goes_on_under_the_same_id(tmp_path, monkeypatch):
    told = fake_wandb(monkeypatch)
    tree = tiny.config("dvae", log__wandb="digits")
    for step in (1, 2):
        write(tree, tmp_path, step)
    first, second = (call[1] for call in told if call[0] == "init")
    assert first["id"] == second["id"] and first["resume"] == second["resume"] == "allow"
    assert first["project"] == "digits" and first["config"]["train"]["batch_size"] == 16
    logged = [call[1] for call in told if call[0] == "log"]
    assert logged[0] == {"update": 1, "train/loss": 0.5, "train/IoU/wall, brick": 0.25}
    assert logged[3]["pictures/codes"] == ("image", str(tmp_path / "pictures" / "codes_2.png"))
    assert [call[0] for call in told].count("finish") == 2
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(tree, elsewhere, 1)
    assert [call[1]["id"] for call in told if call[0] == "init"][2] != first["id"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is an extra")
def test_wandb_itself_writes_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        write(tiny.config("dvae", log__wandb="digits"), tmp_path, step)
    number = json.loads((tmp_path / trackers.IDS).read_text())["wandb"]
    files = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert files == [f"run-{number}.wandb"] * 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"pip install {name}, or leave the key"):
        trackers.open_trackers(tiny.config("dvae", **{f"log__{name}": "x"}), tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\x80"])
def test_damaged_ids_are_named(content, tmp_path, mlflow):
    (tmp_path / trackers.IDS).write_bytes(content)
    with pytest.raises(UserError, match="trackers.json is damaged; restore it, or delete it"):
        trackers.open_trackers(tiny.config("dvae", log__mlflow="x"), tmp_path)


def test_a_tracker_that_fails_costs_its_curves_and_not_the_run(tmp_path, capfd):
    class Failing:
        def __init__(self):
            self.calls = 0

        def scalars(self, *args):
            self.calls += 1
            raise ConnectionError("the server is gone")

        def close(self):
            raise AssertionError("it was dropped")

    failing = Failing()
    writer = metrics.Writer(tmp_path, 0, [failing])
    for step in (1, 2):
        writer.scalars(step, "train", VALUES)
    writer.close()
    assert failing.calls == 1 and len(metrics.read(tmp_path)) == 2
    said = capfd.readouterr().err
    assert said.count("ALARM") == 1 and "Failing" in said and "the server is gone" in said
