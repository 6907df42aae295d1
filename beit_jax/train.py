"""The train step and the only training loop."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from beit_jax import bad_update, evaluate, metrics, preemption, progress, saving
from beit_jax.errors import UserError
from beit_jax.gradients import make_gradients
from beit_jax.task import Batch, Task, Weights

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
    def updates_made(self) -> jax.Array:
        """The optimizer's own count, which all schedules follow; a skipped update is none."""
        return self.step - self.skipped

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
    gradients = make_gradients(task, mesh, seed=seed, microbatches=microbatches)

    def step_fn(state: TrainState, frozen, batch):
        grads, (weight, (statistics, sums)) = gradients(state, frozen, batch)
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
        # What was not finite is no number, and so in nobody's mean: null in the file.
        found = {k: jnp.where(finite, v, jnp.nan) for k, v in task.finalize(sums).items()}
        values = {
            **found,
            **{name: fn(state.updates_made) for name, fn in task.schedules.items()},
            "grad_norm": grad_norm,
            "skipped": skipped,
            "skipped_in_a_row": in_a_row,
        }
        return TrainState(state.step + 1, *kept, skipped, in_a_row), values

    return jax.jit(step_fn, donate_argnums=0)


def train(
    task: Task,
    state: TrainState,
    train_step,
    batches: Iterator[Batch],
    evaluation: Callable[[TrainState], None],
    *,
    config,
    folder: Path,
    total_steps: int,
    saver: saving.Saver,
    stop: preemption.Stop,
    writer: metrics.Writer,
    screen: progress.Screen,
) -> TrainState:
    """Runs updates until `total_steps`: update, log, save, evaluate.

    Metrics are fetched while the next update is already queued, so the devices never wait. A state
    is saved before it is evaluated, so that an evaluation can be left at any time.

    Raises:
      Interrupted: when asked to stop, at the next update and after saving.
      UserError: after `config.train.max_skipped` non-finite updates in a row, or too many saves
        that failed.
    """
    cadence = config.train
    pending = None  # (step, metrics) of the last update, not fetched yet
    step, in_a_row = int(state.step), int(state.skipped_in_a_row)
    log = partial(_log, task=task, cadence=cadence, writer=writer, saver=saver, screen=screen)
    started = time.perf_counter()
    screen.start(step)
    try:
        while step < total_steps:
            batch = screen.next_batch(batches, pending and pending[1])
            state, values = train_step(state, task.frozen, batch)
            step += 1
            stop.unsaved = True
            if pending is not None:
                in_a_row = log(*pending)
            pending = (step, values)
            stopping, evaluating = stop.requested(), evaluation_due(config, step, total_steps)
            checkpoint_due = step % cadence.checkpoint_every == 0 or saver.due()
            # The next update could be one too many: its batch and the state must still be there.
            if evaluating or stopping or checkpoint_due or in_a_row + 1 >= cadence.max_skipped:
                in_a_row, pending = log(*pending), None
            if in_a_row >= cadence.max_skipped:
                raise UserError(bad_update.keep(folder, config, task, state, batch))
            if evaluating or stopping or checkpoint_due:
                saver.save(state)
            if stopping:
                raise preemption.Interrupted(stop.sentence())
            if evaluating:
                evaluation(state)
        saver.finish(state)
    except preemption.Interrupted:
        saver.finish_now()
        raise
    finally:
        screen.stop()
        seconds = time.perf_counter() - started
        writer.scalars(step, "timing", {"train_seconds": seconds, "devices": jax.device_count()})
    return state


def evaluation_due(config, step: int, total_steps: int) -> bool:
    """Whether the state after `step` updates is to be evaluated."""
    every = config.train.eval_every
    return step == total_steps or (step > 0 and every > 0 and step % every == 0)


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
    writer.scalars(step, metrics.evaluated(split), scores)
    writer.scalars(step, "timing", {"eval_seconds": time.perf_counter() - started})
    return scores


def _log(step: int, values, *, task: Task, cadence, writer, saver, screen) -> int:
    """Waits for one update; every `log_every` updates fetches and writes its metrics.

    Returns the number of updates up to it that were skipped in a row.
    """
    in_a_row = int(values["skipped_in_a_row"])
    screen.advance(step)
    if step % cadence.log_every == 0 or step == 1:
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}
        writer.scalars(step, "train", numbers)
        if rates := screen.rates(step):
            writer.scalars(step, "timing", rates)
        screen.show(step, numbers)
        alarms = {**saver.alarms(), **writer.alarms()}
        if in_a_row:
            alarms["skipped"] = (
                f"not finite, so the update was skipped, and {int(numbers['skipped'])} of this "
                f"run's were; {cadence.max_skipped} in a row end it."
            )
        else:  # whose numbers exist
            alarms |= task.alarms(numbers)
        screen.alarm(step, alarms)
    return in_a_row


def total_steps(config, examples: int) -> int:
    """Updates of the whole run, from `config.train.steps` or `config.train.epochs`."""
    if config.train.steps < 0 or config.train.epochs < 0:
        raise UserError("config.train.steps and config.train.epochs cannot be negative.")
    return config.train.steps or math.ceil(config.train.epochs * examples / config.train.batch_size)
