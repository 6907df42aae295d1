"""The train step and the only training loop."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from beit_jax import checkpoint, evaluate, metrics, progress, sharding
from beit_jax.errors import UserError
from beit_jax.task import Batch, Task, Weights, row_keys

PyTree = Any


class TrainState(NamedTuple):
    """Everything that an update reads and writes, and that a checkpoint holds."""

    step: jax.Array  # int32: updates, which is also the number of global batches consumed
    params: PyTree
    ema_params: PyTree  # averaged weights, or None
    model_state: PyTree
    opt_state: optax.OptState
    skipped: jax.Array  # int32: updates skipped because they were not finite
    skipped_in_a_row: jax.Array  # int32

    @property
    def evaluated_params(self) -> PyTree:
        """The weights that evaluation and later stages read: the averaged ones where kept."""
        return self.params if self.ema_params is None else self.ema_params


def create_state(params: PyTree, model_state: PyTree, optimizer, *, ema: bool) -> TrainState:
    """The state before the first update; traceable."""
    # No two leaves share a buffer: the step donates each of them.
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    average = jax.tree.map(jnp.copy, params) if ema else None
    opt_state = optimizer.init(params)
    return TrainState(step, params, average, model_state, opt_state, skipped, in_a_row)


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    microbatches: int,
    ema_decay: float,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated."""

    def step_fn(state: TrainState, frozen, batch):
        rows = next(iter(batch.values())).shape[0]
        keys = row_keys(seed, state.step, jnp.arange(rows))
        batch = task.augment(batch, keys)
        # The optimizer's own count stands still in a skipped update; all schedules follow it.
        updates_made = state.step - state.skipped

        def gradients(batch, keys):
            def loss_sum(params):
                (loss, weight), aux = task.loss_fn(
                    params, state.model_state, frozen, batch, keys, updates_made
                )
                return loss, (weight, aux)

            (_, aux), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.params)
            return grads, aux

        grads, (weight, (statistics, sums)) = _accumulate(
            gradients, (batch, keys), microbatches, mesh
        )
        with jax.named_scope("optimizer"):
            # A batch without a label weighs nothing, and says nothing about its gradient: zero.
            grads = jax.tree.map(lambda g: g / (weight + (weight == 0)), grads)
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(grad_norm)
            for total, count in sums.values():
                finite &= jnp.isfinite(total).all() & jnp.isfinite(count).all()
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema_params = state.ema_params
            if ema_params is not None:
                ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
            model_state = task.update_state(state.model_state, statistics)
            new = (params, ema_params, model_state, opt_state)
            old = (state.params, state.ema_params, state.model_state, state.opt_state)
            kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        skipped = state.skipped + ~finite
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        values = {
            **task.finalize(sums),
            **{name: fn(updates_made) for name, fn in task.schedules.items()},
            "grad_norm": grad_norm,
            "skipped": skipped,
            "skipped_in_a_row": in_a_row,
        }
        return TrainState(state.step + 1, *kept, skipped, in_a_row), values

    return jax.jit(step_fn, donate_argnums=0)


def _accumulate(fn, rows: PyTree, microbatches: int, mesh: Mesh):
    """Sums `fn(*rows)` over microbatches, each spread over all devices as the batch is.

    Microbatch `a` takes every `microbatches`-th row, so each device cuts up its own rows and
    nothing moves.
    """
    if microbatches == 1:
        return fn(*rows)

    def split(x):
        x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *sharding.BATCH)))

    def body(total, rows):
        return jax.tree.map(jnp.add, total, fn(*rows)), None

    stacked = jax.tree.map(split, rows)
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, stacked)[0]


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


def train(
    task: Task,
    state: TrainState,
    train_step,
    batches: Iterator[Batch],
    split_batches: Callable[[str], Iterator[Batch]],
    *,
    config,
    total_steps: int,
    keeper: checkpoint.Keeper,
    writer: metrics.Writer,
    screen: progress.Screen,
) -> TrainState:
    """Runs updates until `total_steps`: update, log, evaluate, save.

    Metrics are fetched while the next update is already queued, so the devices never wait.

    Raises:
      Interrupted: on SIGINT or SIGTERM, at the next update and after saving.
      UserError: after `config.train.max_skipped` non-finite updates in a row.
    """
    cadence = config.train
    eval_step = evaluate.make_eval_step(task, config.seed)
    stop = _StopRequest(keeper)
    pending = None  # (step, metrics) of the last update, not fetched yet
    step = int(state.step)
    started = time.perf_counter()
    screen.start(step, total_steps)
    try:
        while step < total_steps:
            state, values = train_step(state, task.frozen, next(batches))
            step += 1
            if pending is not None:
                _log(*pending, task.alarms, cadence, writer, screen)
            pending = (step, values)
            stopping = stop.requested(step)
            evaluating = step == total_steps or (
                cadence.eval_every and step % cadence.eval_every == 0
            )
            if evaluating or stopping or step % cadence.checkpoint_every == 0:
                _log(*pending, task.alarms, cadence, writer, screen)
                pending, scores = None, None
                try:
                    if evaluating:
                        scores = run_evaluation(
                            task, state, eval_step, split_batches, config, writer
                        )
                        screen.evaluated(step, scores)
                        screen.alarm(step, task.alarms(scores))
                finally:  # what was learnt is kept, whatever the evaluation ran into
                    keeper.save(state, scores)
            if stopping:
                keeper.wait()
                raise Interrupted(
                    f"stopped at update {step} and saved; the same command resumes there"
                )
        keeper.wait()
    finally:
        screen.stop()
        writer.scalars(step, "timing", {"train_seconds": time.perf_counter() - started})
    return state


def run_evaluation(task: Task, state: TrainState, eval_step, split_batches, config, writer) -> dict:
    """Evaluates on `config.data.eval_split`, runs the evaluators, writes all of it."""
    started = time.perf_counter()
    split, step = config.data.eval_split, int(state.step)
    weights = Weights(state.evaluated_params, state.model_state, task.frozen)
    scores = evaluate.evaluate(task, eval_step, weights, split_batches(split))
    if config.eval.raw and state.ema_params is not None:
        raw = weights._replace(params=state.params)
        found = evaluate.evaluate(task, eval_step, raw, split_batches(split))
        scores |= {f"raw_{name}": value for name, value in found.items()}
    for evaluator in task.evaluators.values():
        values, pictures = evaluator(weights, split_batches)
        scores |= values
        writer.pictures(step, pictures)
    scores = {name: float(value) for name, value in scores.items()}
    writer.scalars(step, split, scores)
    writer.scalars(step, "timing", {"eval_seconds": time.perf_counter() - started})
    return scores


def _log(
    step: int, values, alarms, cadence, writer: metrics.Writer, screen: progress.Screen
) -> None:
    """Waits for one update; every `log_every` updates fetches and writes its metrics."""
    in_a_row = int(values["skipped_in_a_row"])
    screen.advance(step)
    if in_a_row >= cadence.max_skipped:
        raise UserError(
            f"The last {in_a_row} updates up to {step} were not finite (config.train.max_skipped="
            f"{cadence.max_skipped}); start in a new --workdir with a lower "
            "config.optimizer.learning_rate, a longer warm-up or a smaller config.optimizer.clip."
        )
    if step % cadence.log_every and step != 1:
        return
    numbers = {name: float(value) for name, value in jax.device_get(values).items()}
    writer.scalars(step, "train", numbers)
    if rates := screen.rates(step):
        writer.scalars(step, "timing", rates)
    screen.show(step, numbers)
    screen.alarm(step, alarms(numbers))


class _StopRequest:
    """Turns SIGINT and SIGTERM into a question asked after every update, alike on all hosts."""

    def __init__(self, keeper: checkpoint.Keeper):
        self._keeper = keeper
        self._signal = None
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._remember)

    def _remember(self, number, _frame):
        self._signal = number
        signal.signal(number, signal.default_int_handler)  # a second one stops at once

    def requested(self, step: int) -> bool:
        if jax.process_count() > 1:
            return self._keeper.reached_preemption(step)
        return self._signal is not None


def total_steps(config, examples: int) -> int:
    """Updates of the whole run, from `config.train.steps` or `config.train.epochs`."""
    if config.train.steps < 0 or config.train.epochs < 0:
        raise UserError("config.train.steps and config.train.epochs cannot be negative.")
    return config.train.steps or math.ceil(config.train.epochs * examples / config.train.batch_size)
