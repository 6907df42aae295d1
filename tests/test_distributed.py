"""Processes of one run: joined over loopback, lost one by one, and gone on with in fewer."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import pytest
import tiny
from fake_machine import ROOT

from beit_jax import distributed, metrics, preemption
from beit_jax.errors import UserError

STEPS, SAVED = 40, 5
ONE_DEVICE = {
    **os.environ,
    **tiny.on_devices(1),
    "PYTHONPATH": str(ROOT),
    "VENV": sys.prefix,
}


def process(*flags, cwd=ROOT, **variables) -> subprocess.Popen:
    """A training process of one CPU device."""
    return subprocess.Popen(
        [sys.executable, "-m", "beit_jax.main", *map(str, flags)],
        env=ONE_DEVICE | variables,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def joined(count: int) -> list[tuple[str, ...]]:
    """The flags that join processes, for each of them."""
    together = (f"--coordinator=localhost:{tiny.free_port()}", f"--num_processes={count}")
    return [(*together, f"--process_id={number}") for number in range(count)]


def ended(processes) -> list[str]:
    """The outputs of processes that end by themselves."""
    return [each.communicate(timeout=120)[0] for each in processes]


def wait_for_update(folder: Path, step: int, processes) -> None:
    """Returns as soon as a run has logged an update behind a finished checkpoint."""
    while True:
        for each in processes:
            assert each.poll() is None, each.communicate()[0]
        if (folder / "metrics.jsonl").exists():
            lines = [line["step"] for line in metrics.read(folder)]
            saved = [p for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
            if lines and lines[-1] >= step and any(int(p.name) > step - SAVED for p in saved):
                return
        time.sleep(0.02)


def child_of(parent: subprocess.Popen, argument: str) -> int:
    """The process that `parent` started with `argument`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().decode().split("\0")
            status = (path / "stat").read_text()
        except OSError:  # ended meanwhile
            continue
        if int(status.rsplit(")", 1)[1].split()[1]) == parent.pid and argument in line:
            return int(path.name)
    raise AssertionError(f"no child with {argument}")


@pytest.fixture(scope="module")
def recipe():
    return tiny.config(
        "classify",
        model__width=16,
        model__depth=1,
        train__steps=STEPS,
        train__checkpoint_every=SAVED,
        mesh__heartbeat_timeout=5,
        mesh__start_timeout=200,
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    to_the_end(recipe, folder)
    return folder


def to_the_end(recipe, folder: Path) -> None:
    """Starts or resumes a run in one process."""
    tiny.store_config(folder, recipe)
    alone = process(f"--workdir={folder}")
    [output] = ended([alone])
    assert alone.returncode == 0, output


def values(folder: Path) -> list[dict]:
    return [line for line in metrics.read(folder) if line["split"] != "timing"]


def test_a_run_survives_its_processes(recipe, whole, tmp_path):
    """Four processes, a worker killed; two, the coordinator killed; one, to the end."""
    tiny.store_config(tmp_path, recipe)
    four = [process(f"--workdir={tmp_path}", *flags) for flags in joined(4)]
    wait_for_update(tmp_path, SAVED + 1, four)
    four[2].kill()
    ended(four)
    assert all(each.returncode != 0 for each in four)

    launcher = subprocess.Popen(
        [ROOT / "launch/local_processes.sh", "2", "--", f"--workdir={tmp_path}"],
        env=ONE_DEVICE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_update(tmp_path, 2 * SAVED + 2, [launcher])
    os.kill(child_of(launcher, "--process_id=0"), signal.SIGKILL)
    [output] = ended([launcher])
    assert launcher.returncode == 128 + signal.SIGKILL
    *_, last = output.strip().splitlines()
    assert "process 0 was killed (signal 9)" in last and "resuming at update" in output

    to_the_end(recipe, tmp_path)
    expected, found = values(whole), values(tmp_path)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(expected, found, strict=True):
        for name in a.keys() - {"split"}:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_one_that_is_asked_to_stop_stops_all_alike(recipe, whole, tmp_path):
    """In an evaluation, where JAX itself would not ask."""
    slow = recipe.copy_and_resolve_references()
    slow.train.eval_every, slow.eval.batch_size = SAVED, 2
    tiny.store_config(tmp_path, slow)
    two = [process(f"--workdir={tmp_path}", *flags) for flags in joined(2)]
    wait_for_update(tmp_path, SAVED, two)
    two[1].terminate()
    for each, output in zip(two, ended(two), strict=True):
        assert each.returncode == preemption.STATUS, output
        assert f"stopped at update {SAVED}, which is saved" in output.strip().splitlines()[-1]
    assert values(tmp_path)[-1]["split"] == "train"
    to_the_end(slow, tmp_path)
    evaluated = [line["step"] for line in values(tmp_path) if line["split"] == "validation"]
    assert evaluated == [*range(SAVED, STEPS + 1, SAVED)]


def test_a_mistake_on_one_machine_ends_the_others(recipe, tmp_path):
    """Only the first has the folder of images; both have the same command."""
    tiny.store_config(tmp_path / "run", recipe)
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    for number in range(40):
        path = here / f"photos/class_{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((8, 8), number, np.uint8))
    command = (f"--workdir={tmp_path / 'run'}", "--config.data.source=folder:photos",
               "--config.mesh.heartbeat_timeout=300")  # fmt: skip
    places = zip(joined(2), (here, there), strict=True)
    first, second = [process(*command, *flags, cwd=place) for flags, place in places]
    said, why = (output.strip().splitlines()[-1] for output in ended([first, second]))
    assert second.returncode == 1 and why.startswith("error: ") and "photos" in why
    assert first.returncode == distributed.ANOTHER_FAILED, said
    assert said.startswith("stopped, because process 1 (")
    assert said.endswith(why.removeprefix("error: "))


def test_tasks_of_slurm_find_each_other_and_see_who_differs(recipe, tmp_path):
    tiny.store_config(tmp_path, recipe)
    job = str(tiny.free_port())
    tasks = [
        process(
            f"--workdir={tmp_path}",
            f"--config.train.log_every={number + 1}",
            SLURM_JOB_ID=job,  # of which JAX makes the port
            SLURM_STEP_NODELIST="localhost",
            SLURM_STEP_NUM_TASKS="2",
            SLURM_NTASKS="2",
            SLURM_PROCID=str(number),
            SLURM_LOCALID=str(number),
        )
        for number in range(2)
    ]
    for task, output in zip(tasks, ended(tasks), strict=True):
        assert task.returncode == 1, output
        assert "has config.train.log_every=2, but process 0" in output.strip().splitlines()[-1]


def test_a_process_that_never_comes_is_missed(recipe, tmp_path):
    tiny.store_config(tmp_path, recipe)
    coordinator, _ = joined(2)
    alone = process(f"--workdir={tmp_path}", "--config.mesh.start_timeout=2", *coordinator)
    [output] = ended([alone])
    assert alone.returncode == 1
    last = output.strip().splitlines()[-1]
    assert "not all processes came together within 2 s (seen from process 0 of 2 at" in last


class Store:
    """JAX's key-value store, as process 0 sees it, with notes of process 1 in it."""

    def __init__(self, **notes):
        self.notes = {f"{distributed.STARTED}1": json.dumps({"host": "b", **notes})}

    def key_value_set(self, key, value):
        self.notes[key] = value

    def wait_at_barrier(self, name, milliseconds):
        while len(self.notes) < 2:
            time.sleep(0.01)

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.notes.items() if key.startswith(prefix)]


def joined_by(monkeypatch, store: Store):
    state = SimpleNamespace(client=store, process_id=0, num_processes=2, coordinator_address="a:1")
    monkeypatch.setattr(distributed.internals, "global_state", state)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"backend": "gpu"}, "process 1 (b) has backend=gpu, but process 0 ("),
        ({"devices": 4}, "process 1 (b) has devices=4, but process 0 ("),
        ({"jax": "0.9.0"}, "process 1 (b) has jax=0.9.0, but process 0 ("),
        ({"--workdir": "/b"}, "process 1 (b) has --workdir=/b, but process 0 ("),
    ],
)
def test_who_differs_is_named(monkeypatch, other, said):
    alike = {"backend": "cpu", "devices": 8, "jax": jax.__version__, "--workdir": "/a"}
    with monkeypatch.context() as patch:
        joined_by(patch, Store(**alike))
        distributed.agree({"--workdir": "/a"}, timeout=60)
        joined_by(patch, Store(**alike | other))
        with pytest.raises(UserError) as refusal:
            distributed.agree({"--workdir": "/a"}, timeout=60)
    assert said in str(refusal.value)


def test_devices_that_never_get_ready_are_missed(monkeypatch, capfd):
    """Process 1 fell back to the CPU; the accelerators here wait for its accelerator."""
    left = threading.Event()

    def never():
        left.wait(60)
        raise TimeoutError

    with monkeypatch.context() as patch:
        joined_by(patch, Store(backend="cpu", devices=1))
        patch.setattr(jax, "default_backend", never)
        patch.setattr(distributed, "_leave", lambda status: left.set())
        with pytest.raises(TimeoutError):
            distributed.agree({}, timeout=0.2)
    said = capfd.readouterr().err
    assert "process 1 (b) has 1 of cpu, nothing from 0;" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("localhost:1", 2, None), "go together"),
        (("localhost", 2, 0), "host:port"),
        (("localhost:1", 2, 2), "--process_id"),
    ],
)
def test_arguments_that_cannot_work(arguments, said):
    with pytest.raises(UserError, match=said):
        distributed.start(*arguments, start_timeout=5, heartbeat_timeout=5)
