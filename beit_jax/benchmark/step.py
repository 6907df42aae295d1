"""What a training step costs."""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import architecture, checkpoint, tasks
from beit_jax.benchmark import flops, peer, profile, timing
from beit_jax.models.layers import at_tokens
from beit_jax.run import Run
from beit_jax.task import Batch, Task, row_keys
from beit_jax.tasks import mim
from beit_jax.tokenizer import Tokenizer, from_weights
from beit_jax.train import TrainState

PARTS = ("tokenizer", "masking", "encoder", "lm_head", "optimizer")


class Step:
    """The training step of a config, compiled, with a state and one batch on the devices."""

    def __init__(self, config: ConfigDict, folder: Path, build: Callable[..., Task]):
        """`build` makes the task, as `tasks.build` does."""
        run = Run(config, folder, build=build)
        placed = jax.tree.map(lambda x: x.sharding, run.abstract_state())
        create = jax.jit(run.create_state, out_shardings=placed)
        self.state = create(jax.random.key(config.seed))
        with contextlib.closing(run.train_batches(0)) as batches:
            self.batch = next(batches)
        self._frozen = run.task.frozen
        started = time.perf_counter()
        self.lowered = run.train_step.lower(self.state, self._frozen, self.batch)
        self.compiled = self.lowered.compile()
        self.compile_seconds = time.perf_counter() - started
        # In float32, since other products are split in two, or are a library's that cannot be read.
        exact = config.copy_and_resolve_references()
        exact.model.dtype = exact.dvae.dtype = "float32"
        task = Run(exact, folder, build=build).task
        self.model_flops = _model_flops(task, self.state, self.batch)

    def update(self) -> None:
        """Starts one update."""
        self.state, self._values = self.compiled(self.state, self._frozen, self.batch)

    def wait(self) -> None:
        """Returns when all updates are made."""
        jax.block_until_ready((self.state, self._values))

    def __call__(self) -> None:
        """Makes one update and waits for it."""
        self.update()
        self.wait()

    def part_shares(self) -> dict:
        """Shares of an update's time by part; no turn is measured after it."""
        if jax.default_backend() == "gpu":  # else graphs of kernels hide where each comes from
            self.compiled = self.lowered.compile({"xla_gpu_enable_command_buffer": ""})
        return profile.part_shares(self, self.compiled.as_text(), PARTS)


def measure(config: ConfigDict, folder: Path, options: argparse.Namespace) -> dict:
    """Time, FLOPs, memory and compilation of the step, and what its parts take.

    Pre-training on tokens is measured with its tokenizer and without, where the labels cost
    nothing. The peer has no tokenizer.
    """
    libraries = peer.libraries(config) if options.peer else None
    steps = make_steps(config, folder)
    peers = peer.make(config, steps["step"].batch["image"], *libraries) if options.peer else {}
    product, product_flops = _matrix_product(config.model.dtype)
    updates = timing.starts()
    programs = {
        name: partial(_several, program, updates) for name, program in {**steps, **peers}.items()
    }
    programs["product"] = product
    turns = timing.in_turns(programs, options.repeats)
    seconds = {name: [turn / updates for turn in turns[name]] for name in {**steps, **peers}}

    peak = product_flops / min(turns["product"]) * jax.device_count()
    found = {"matrix_product_flops_per_second": peak}
    for name, step in steps.items():
        found[name] = _costs(step, statistics.median(seconds[name]), peak, config.train.batch_size)
    for name in peers:
        found[name] = {"median_seconds": statistics.median(seconds[name])} | {
            f"times_our_{ours}": timing.ratio(seconds[name], seconds[ours]) for ours in steps
        }
    shares = steps["step"].part_shares()
    return found | {"parts_of_the_step": {f"{part}_share": s for part, s in shares.items()}}


def _several(program, updates: int) -> None:
    """Makes updates of a `Step` or a `peer.Peer`, and waits once."""
    for _ in range(updates):
        program.update()
    program.wait()


def make_steps(config: ConfigDict, folder: Path) -> dict[str, Step]:
    """The config's step and, where it has a tokenizer, the step without."""
    builds = {"step": tasks.build}
    if config.task == "mim" and config.mim.target == "tokens":
        builds = {"step": _with_tokenizer, "step_without_tokenizer": _with_labels_for_nothing}
    return {name: Step(config, folder, build) for name, build in builds.items()}


def _costs(step: Step, seconds: float, peak: float, batch: int) -> dict:
    return {
        "median_seconds": seconds,
        "images_per_second": batch / seconds,
        "model_flops_per_image": step.model_flops / batch,
        "xla_flops_per_image": _xla_flops(step.compiled) / batch,
        "mfu_share": step.model_flops / seconds / peak,
        "compile_seconds": step.compile_seconds,
        "memory_bytes": _memory(step.compiled),
    }


def _model_flops(task: Task, state: TrainState, batch: Batch) -> int:
    """FLOPs of an update's matrix products."""

    def gradients(params, model_state, frozen, batch):
        keys = row_keys(0, jnp.int32(0), jnp.arange(len(next(iter(batch.values())))))
        batch = task.augment(batch, keys)

        def loss(params):
            return task.loss_fn(params, model_state, frozen, batch, keys, jnp.int32(0))[0][0]

        return jax.grad(loss)(params)

    return flops.matrix_flops(gradients, state.params, state.model_state, task.frozen, batch)


def _xla_flops(compiled) -> float:
    """FLOPs of an update by XLA's count, which on a GPU leaves out what libraries' kernels do."""
    return compiled.cost_analysis()["flops"] * jax.device_count()


def _memory(compiled) -> int:
    """Bytes that the step needs on a device, counted by the compiler."""
    found = compiled.memory_analysis()
    arguments = found.argument_size_in_bytes + found.output_size_in_bytes
    return arguments - found.alias_size_in_bytes + found.temp_size_in_bytes


def _matrix_product(dtype: str) -> tuple[Callable[[], object], int]:
    """Large matrix products in `dtype`, which say what a device can do, and their FLOPs.

    Of random numbers: a GPU multiplies ones faster, which take less power.
    """
    side, products = 2048 if jax.default_backend() == "cpu" else 8192, timing.starts()
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    multiply = jax.jit(lambda x: x @ x)
    flops = products * 2 * side**3
    return lambda: jax.block_until_ready([multiply(x) for _ in range(products)]), flops


def _with_tokenizer(config, source, run: Path):
    """Pre-training on the config's tokenizer, or on a dVAE of its size with random weights."""
    if Path(config.tokenizer.path).exists():
        return tasks.build(config, source, run)
    dvae = {**config.to_dict(), "task": "dvae"}
    shapes = architecture.images_of(config).shape
    network = architecture.make_dvae(config)
    params = jax.jit(partial(network.init, method="encode"))(jax.random.key(0), jnp.zeros(shapes))
    weights = checkpoint.Weights(params["params"], {}, dvae, "random weights", "", "weights")
    tokens = from_weights(weights, "the benchmark", config.model.dtype)
    return mim.assemble(config, source, mim.tokens_of(config, tokens), {})


def _with_labels_for_nothing(config, source, run: Path):
    """Pre-training on codes that are the patches' brightness."""
    del run
    codes = config.dvae.vocabulary

    def tokens(variables, images, read=None):
        found = (images.mean(-1) * (codes - 1)).astype(jnp.int32)
        return found if read is None else at_tokens(found.reshape(len(found), -1), read)

    free = Tokenizer(
        source="brightness",
        variables={},
        vocabulary=codes,
        factor=1,
        grid=None,
        channels=config.data.channels,
        interpolation=config.data.interpolation,
        tokens=tokens,
        pictures=None,
        nats=None,
    )
    return mim.assemble(config, source, mim.tokens_of(config, free), {})
