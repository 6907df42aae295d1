"""Runs small enough for tests, on the digits: one of every task that trains."""

import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from beit_jax import checkpoint, train
from beit_jax.architecture import make_network, variables_of
from beit_jax.run import Run, store_config
from configs import (
    digits_classify,
    digits_dvae,
    digits_mim,
    digits_pixel_decoder,
    digits_probe,
    digits_segment,
    digits_vqkd,
)

RECIPES = {
    "dvae": digits_dvae,
    "mim": digits_mim,
    "pixel_decoder": digits_pixel_decoder,
    "classify": digits_classify,
    "vqkd": digits_vqkd,
    "probe": digits_probe,
    "segment": digits_segment,
}


class Images:
    """As much of a `Source` as building a task takes."""

    mask_classes = ()  # label maps of classes without names

    def __init__(self, number: int, class_names: tuple[str, ...] = ()):
        self.number, self.class_names = number, class_names

    def __len__(self) -> int:
        return self.number


def config(task: str, **changes):
    """The quick start's config of `task` with tiny networks; `changes` use __ for dots."""
    tree = RECIPES[task].get_config()
    tree.update_from_flattened_dict(
        {
            "model.width": 32,
            "model.depth": 2,
            "model.heads": 2,
            "dvae.width": 8,
            "dvae.vocabulary": 16,
            "dvae.decoder_input": 8,
            "segment.classes": 0,  # the data's
            "segment.taps": (1, 1, 2, 2),
            "segment.auxiliary_width": 8,
            "vqkd.codes": 16,
            "vqkd.code_width": 8,
            "vqkd.teacher_width": 32,
            "train.batch_size": 16,
            "train.log_every": 1,
            "train.steps": 4,
            "optimizer.warmup_epochs": 0.0,
            "optimizer.warmup_steps": 0,
            "eval.batch_size": 64,
            "eval.knn": (),
            "eval.probe": False,
            "init.path": "",
            "data.workers": 0,
        }
    )
    tree.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return tree


def run(tree, folder: Path, devices=None) -> Run:
    """A run in `folder`, as the command line would start it."""
    return Run(tree, folder, devices)


def keeper(folder: Path) -> checkpoint.Keeper:
    return checkpoint.Keeper(folder, keep=1, best="loss", maximize=False)


def fresh_state(which: Run):
    """The state that `which` starts from."""
    return which.initial_state(keeper(which.folder), "train")[0]


def random_tokenizer(folder: Path, **changes) -> Path:
    """A dVAE that no update has touched, saved as a run's folder."""
    tree = config("dvae", **changes)
    store_config(folder, tree)
    saving = keeper(folder)
    saving.save(fresh_state(run(tree, folder, jax.devices()[:1])))
    saving.close()
    return folder


def random_network(folder: Path, tree, outputs: int) -> Path:
    """The network of a config with random weights, as an imported run's folder."""
    network, inputs = make_network(tree, outputs)
    random = np.random.default_rng(tree.seed)

    def draw(path, leaf):
        mean = float(path[-1].key == "scale")  # so that norms let their input through
        return random.normal(mean, 0.2, leaf.shape).astype(leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, variables_of(network, *inputs))
    store_config(folder, tree)
    checkpoint.save_weights(folder, dict(variables))
    return folder


def killed_after(run: Run, updates: int) -> None:
    """Trains, and dies like a process that was killed before update `updates` + 1."""
    batches = run.train_batches

    def dying(start):
        for number, batch in enumerate(batches(start)):
            if number == updates:
                raise MemoryError
            yield batch

    run.train_batches = dying
    with pytest.raises(MemoryError):
        run.execute("train")


def rebuilt_step(which: Run):
    """The train step of a run whose task was changed."""
    return train.make_train_step(
        which.task, which.optimizer, which.mesh, seed=0, microbatches=1, ema_decay=0.0
    )


def first_moment(opt_state):
    """Adam's first moment, from an optimizer state or from one read off a checkpoint."""
    if isinstance(opt_state, dict | list | tuple):
        if hasattr(opt_state, "mu"):
            return opt_state.mu
        if isinstance(opt_state, dict) and "mu" in opt_state:
            return opt_state["mu"]
        parts = opt_state.values() if isinstance(opt_state, dict) else opt_state
        found = [first_moment(part) for part in parts]
        return next((moment for moment in found if moment is not None), None)
    return None


def free_port() -> int:
    """A port that no program listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def on_devices(number: int) -> dict[str, str]:
    """The environment variable with which a process of a test has so many CPU devices."""
    flags = os.environ["XLA_FLAGS"]
    return {"XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={number}", flags)}


def two_processes(tree, folder: Path) -> None:
    """Trains in two processes of four CPU devices each, joined over loopback."""
    port = free_port()
    store_config(folder, tree)
    script = folder / "process.py"
    script.write_text(PROCESS)
    started = [
        subprocess.Popen(
            [sys.executable, script, f"localhost:{port}", str(i), folder],
            env=os.environ | on_devices(4),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)


# A process of a distributed run, with four CPU devices: coordinator, process number, run folder.
PROCESS = """
import sys
import jax
jax.config.update("jax_default_matmul_precision", "highest")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pathlib import Path
from ml_collections import ConfigDict
from beit_jax import checkpoint, run
folder = Path(sys.argv[3])
run.Run(ConfigDict(checkpoint.read_config(folder)), folder).execute("train")
"""


def pretend_gpu(monkeypatch, capability: str) -> None:
    """Lets JAX name an NVIDIA GPU as its first device, as far as that is asked for alone."""
    gpu = types.SimpleNamespace(
        client=types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000"),
        compute_capability=capability,
    )
    local_devices = jax.local_devices
    monkeypatch.setattr(
        jax,
        "local_devices",
        lambda backend=None: local_devices(backend=backend) if backend else [gpu],
    )


def pretend_cudnn(monkeypatch) -> list[int]:
    """Lets JAX's own attention stand in for cuDNN's; returns the lengths it will be called with."""
    own, lengths = jax.nn.dot_product_attention, []

    def cudnn(q, k, v, bias, *, implementation):
        assert implementation == "cudnn" and (bias is None or bias.dtype == q.dtype)
        assert bias is None or q.shape[1] % 2 == 0
        lengths.append(q.shape[1])
        return own(q, k, v, bias)

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    return lengths
