"""One run: the parts that a config asks for, put together and executed."""

import contextlib
import json
from pathlib import Path

import jax
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from beit_jax import (
    checkpoint,
    class_names,
    environment,
    evaluate,
    frozen,
    health,
    lock,
    metrics,
    optimizer,
    plan,
    preemption,
    progress,
    reading,
    same_data,
    saving,
    sharding,
    tasks,
    trackers,
    train,
    warm_start,
)
from beit_jax.data import pipeline, sources
from beit_jax.errors import UserError
from beit_jax.limits import check
from beit_jax.task import Task


class Run:
    """One run's parts, built from a resolved config: mesh, data, task and optimizer."""

    def __init__(self, config: ConfigDict, folder: Path, devices=None, build=tasks.build):
        """Builds everything and trains nothing; `devices` defaults to all, `build` makes the task.

        Raises:
          UserError: for a config that cannot work.
        """
        self.config, self.folder = config, folder
        self.stop = preemption.Stop()
        check(config)
        self.mesh = sharding.make_mesh(config.mesh.fsdp, devices)
        self.source = self._open(config.data.train_split)
        if config.data.labels_per_class:
            self.source = sources.FewLabels(self.source, config.data.labels_per_class, config.seed)
        self.steps = train.total_steps(config, len(self.source))
        task = build(config, self.source, folder)
        task, self.optimizer = with_optimizer(task, config, self.steps, len(self.source))
        placed = sharding.state_sharding(task.frozen, self.mesh)
        self.task = task._replace(frozen=jax.device_put(task.frozen, placed))
        self.train_step = train.make_train_step(
            self.task,
            self.optimizer,
            self.mesh,
            seed=config.seed,
            microbatches=config.train.accumulate,
            ema_decay=config.train.ema_decay,
        )

    def execute(self, mode: str, stop: preemption.Stop | None = None) -> None:
        """Trains (or resumes) and evaluates, or evaluates the newest checkpoint.

        Raises:
          Interrupted: `stop` was asked to; the same call goes on from there.
          UserError: for what a person can mend.
        """
        self.stop = stop or self.stop
        self._check_evaluation()
        if mode == "train":
            self._check_training()
        with lock.held(self.folder) if mode == "train" else contextlib.nullcontext():
            if mode == "train":
                self._prepare_folder()
            keeper = checkpoint.Keeper(
                self.folder,
                keep=self.config.train.keep,
                best=self.config.eval.best,
                maximize=self.config.eval.maximize,
                read_only=mode != "train",
            )
            # Closing waits for a save that is being written, whatever ended the run.
            with contextlib.closing(keeper):
                state, origin = self.initial_state(keeper, mode)
                step = int(state.step)
                reached = metrics.last_step(self.folder)
                if mode == "train" and reached > step:
                    origin += f"; updates {step + 1} to {reached} are made again"
                told = trackers.open_trackers(self.config, self.folder)
                writer = metrics.Writer(self.folder, step if mode == "train" else None, told)
                with contextlib.closing(writer):
                    self._train_or_evaluate(mode, state, origin, keeper, writer)

    def _check_training(self) -> None:
        """Refuses what cannot be trained on."""
        if self.config.data.labels_per_class:
            self.source.labels()  # draws them, or refuses
        size, microbatches = self.config.train.batch_size, self.config.train.accumulate
        sharding.check_batch("config.train.batch_size", size, self.mesh, microbatches)

    def _prepare_folder(self) -> None:
        """Refuses other data than before, then writes what does not change any more."""
        same_data.keep(self.folder, self.source, resuming=checkpoint.any_in(self.folder))
        store_config(self.folder, self.config)
        frozen.keep(self.folder, self.task.copies)
        class_names.keep(self.folder, self.task.class_names)

    def _train_or_evaluate(self, mode: str, state, origin: str, keeper, writer) -> None:
        config, stop, step = self.config, self.stop, int(state.step)
        screen = progress.Screen(config.train.batch_size, self.steps)
        screen.say(
            f"{config.task} in {self.folder} on {self.mesh.size} {jax.default_backend()} devices\n"
            f"data: {self.source.description}"
        )
        if mode == "train":
            screen.say(self._plan(state))
        screen.say(origin)
        environment.note(self.folder, mode, step, parameters=plan.numbers(state.params))
        eval_step = evaluate.make_eval_step(self.task, config.seed)

        def evaluation(state) -> None:
            scores = train.run_evaluation(
                self.task, state, eval_step, self.split_batches, config, writer
            )
            screen.evaluated(int(state.step), scores)
            screen.alarm(int(state.step), self.task.alarms(scores))
            screen.judged(int(state.step), self._judge(scores, writer.lines()))
            keeper.evaluated(int(state.step), scores)

        if mode == "eval":
            evaluation(state)
            return
        saver = saving.Saver(keeper, writer, stop, config.train.max_failed_saves)
        if step == self.steps and keeper.latest() is None:
            saver.save(state)  # a run of no updates still hands its weights on
        if train.evaluation_due(config, step, self.steps):
            if not self._was_evaluated(step):  # not yet, or the run was stopped in it
                evaluation(state)
            elif step == self.steps:
                screen.say("all updates were made and evaluated; --mode=eval does so again")
        if step < self.steps:
            train.train(
                self.task,
                state,
                self.train_step,
                self.train_batches(step),
                evaluation,
                config=config,
                folder=self.folder,
                total_steps=self.steps,
                saver=saver,
                stop=stop,
                writer=writer,
                screen=screen,
            )

    def _plan(self, state: train.TrainState) -> str:
        return plan.describe(
            self.config,
            self.mesh,
            steps=self.steps,
            examples=len(self.source),
            warmup=warmup_updates(self.config, len(self.source)),
            state=state,
            frozen=self.task.frozen,
        )

    def _judge(self, scores: dict, lines: list[dict]) -> list[health.Verdict]:
        """How the run is doing; of a codebook the task's own alarm says more."""
        found = health.judge(self.config.to_dict(), lines, len(self.task.class_names))
        told = bool(self.task.alarms(scores))
        return [v for v in found if not (told and v.kind == health.COLLAPSED)]

    def _was_evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has the evaluation of an update; all processes answer alike."""
        line = metrics.evaluations(self.folder).get(step, {"split": None})
        return bool(
            multihost_utils.broadcast_one_to_all(
                line["split"] == metrics.evaluated(self.config.data.eval_split)
            )
        )

    def create_state(self, key: jax.Array, taken=None) -> train.TrainState:
        """The state before the first update, with what is `taken` in place of its own."""
        params, model_state = self.task.init(key)
        if taken is not None:
            params = warm_start.put(params, taken)
            if "batch_stats" in model_state:
                statistics = warm_start.put(model_state["batch_stats"], taken)
                model_state = {**model_state, "batch_stats": statistics}
        return train.create_state(
            params, model_state, self.optimizer, ema=self.config.train.ema_decay > 0
        )

    def abstract_state(self) -> train.TrainState:
        """Shapes and placements of the state, without any array."""
        shapes = jax.eval_shape(self.create_state, jax.random.key(self.config.seed))
        placed = sharding.state_sharding(shapes, self.mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
        )

    def initial_state(self, keeper: checkpoint.Keeper, mode: str) -> tuple[train.TrainState, str]:
        """Where a run starts: its own newest checkpoint > config.init.path > fresh weights."""
        abstract = self.abstract_state()
        if mode == "eval":  # which needs no optimizer, and imported weights have none
            abstract = abstract._replace(opt_state=None)
        if keeper.latest() is not None:
            state, passed_over = keeper.restore(abstract)
            self.stop.saved = int(state.step)
            doing = "evaluating" if mode == "eval" else "resuming at"
            return state, "; ".join(filter(None, [f"{doing} update {state.step}", passed_over]))
        if mode == "eval":
            raise UserError(f"{self.folder} holds no finished checkpoint to evaluate.")
        taken, origin = None, "starting from fresh weights"
        if self.config.init.path and not self.task.frozen_init:
            weights = checkpoint.load_weights(self.config.init.path, "config.init.path")
            wanted = warm_start.variables(abstract.params, abstract.model_state)
            taken, origin = warm_start.warm_start(wanted, weights, self.config)
        placed = jax.tree.map(lambda x: x.sharding, abstract)
        create = jax.jit(self.create_state, out_shardings=placed)
        state = create(jax.random.key(self.config.seed), taken)
        if self.task.warm_start is not None:
            with contextlib.closing(self.stop.between(self.train_batches(0))) as batches:
                model_state, said = self.task.warm_start(
                    state.params, state.model_state, self.task.frozen, batches
                )
            place = jax.jit(lambda tree: tree, out_shardings=placed.model_state)
            state, origin = state._replace(model_state=place(model_state)), f"{origin}\n  {said}"
        return state, origin

    def train_batches(self, start: int):
        """Endless global batches on the devices, from batch number `start`."""
        return reading.train_batches(
            self.source, self.task.views, self.config, self.folder, self.mesh, start
        )

    def split_batches(self, split: str):
        """Every example of a split once, padded to whole batches, on the devices."""
        source = self.source if split == self.config.data.train_split else self._open(split)
        return self.stop.between(
            reading.eval_batches(source, self.task.views, self.config, self.folder, self.mesh)
        )

    def _check_evaluation(self) -> None:
        """Refuses before training what would only fail at the first evaluation."""
        config, task = self.config, self.task
        splits = {config.data.eval_split}
        if {"features", "heads"} & task.evaluators.keys():
            splits.add(config.eval.select_split)
        for split in splits - {config.data.train_split}:
            self._open(split)
        size = reading.eval_batch_size(config, self.mesh)
        batch = pipeline.eval_shapes(task.views, size, config.data.channels)

        def scores(key, frozen, batch):
            params, model_state = task.init(key)
            keys = jax.random.split(key, size)
            return task.finalize(task.eval_fn(params, model_state, frozen, batch, keys))

        names = list(jax.eval_shape(scores, jax.random.key(0), task.frozen, batch))
        if config.eval.raw and config.train.ema_decay:
            names += [f"raw_{name}" for name in names]
        names += ["knn"] * bool(config.eval.knn) + ["probe"] * config.eval.probe
        if config.eval.best not in names:
            raise UserError(
                f"config.eval.best={config.eval.best!r} is not among the evaluation metrics of "
                f"this run; name one of {', '.join(sorted(n for n in names if '/' not in n))}."
            )

    def _open(self, split: str) -> sources.Source:
        return reading.open_split(self.config, split)


def with_optimizer(task: Task, config, steps: int, examples: int):
    """The optax chain, and the task with its schedules logged."""
    c = config.optimizer
    warmup = warmup_updates(config, examples)
    peak = optimizer.scaled_learning_rate(
        c.learning_rate, reference_batch=c.reference_batch, batch_size=config.train.batch_size
    )
    if steps == 0:  # a run that only evaluates its initial weights
        steps, warmup = 1, 0
    schedule = optimizer.make_schedule(c.schedule, peak, c.final_learning_rate, warmup, steps)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    chain = optimizer.make_optimizer(
        params,
        schedule=schedule,
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        clip=c.clip,
        layer_decay=c.layer_decay,
        depth=config.model.depth,
    )
    if task.scale_updates is not None:
        own = optax.stateless(lambda updates, _: task.scale_updates(updates))
        chain = optax.chain(chain, own)
    logged = {"lr": schedule, "weight_decay": lambda _: jax.numpy.float32(c.weight_decay)}
    return task._replace(schedules={**task.schedules, **logged}), chain


def warmup_updates(config, examples: int) -> int:
    """Updates until the learning rate's peak."""
    c = config.optimizer
    return c.warmup_steps or round(c.warmup_epochs * examples / config.train.batch_size)


def store_config(run: Path, config: ConfigDict) -> None:
    """Creates the run's folder with its resolved config."""
    if jax.process_index() == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config.to_dict(), indent=2) + "\n"
            metrics.write_atomically(run / "config.json", text)
        except OSError as error:
            raise UserError(
                f"--workdir={run} cannot be written ({error.strerror}); name another folder."
            ) from error
