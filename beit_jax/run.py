"""One run: the parts that a config asks for, put together and executed."""

import contextlib
import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from beit_jax import checkpoint, evaluate, metrics, optimizer, progress, sharding, tasks, train
from beit_jax.data import pipeline, sources
from beit_jax.errors import UserError
from beit_jax.task import Task


class Run:
    """One run's parts, built from a resolved config: mesh, data, task and optimizer."""

    def __init__(self, config: ConfigDict, folder: Path, devices=None):
        """Builds everything and trains nothing; `devices` defaults to all of them.

        Raises:
          UserError: for a config that cannot work.
        """
        self.config, self.folder = config, folder
        self.mesh = sharding.make_mesh(config.mesh.fsdp, devices)
        size, microbatches = config.train.batch_size, config.train.accumulate
        sharding.check_batch("config.train.batch_size", size, self.mesh, microbatches)
        sharding.check_batch("config.eval.batch_size", config.eval.batch_size, self.mesh)
        self.source = self._open(config.data.train_split)
        if config.data.labels_per_class:
            self.source = sources.few_labels(self.source, config.data.labels_per_class, config.seed)
        self.steps = train.total_steps(config, len(self.source))
        task = tasks.build(config, self.source.class_names, folder)
        task, self.optimizer = with_optimizer(task, config, self.steps, len(self.source))
        placed = sharding.state_sharding(task.frozen, self.mesh)
        self.task = task._replace(frozen=jax.device_put(task.frozen, placed))
        self.train_step = train.make_train_step(
            self.task,
            self.optimizer,
            self.mesh,
            seed=config.seed,
            microbatches=microbatches,
            ema_decay=config.train.ema_decay,
        )

    def execute(self, mode: str) -> None:
        """Trains (or resumes) and evaluates, or evaluates the newest checkpoint."""
        config = self.config
        if mode == "train":
            store_config(self.folder, config)
        keeper = checkpoint.Keeper(
            self.folder,
            keep=config.train.keep,
            best=config.eval.best,
            maximize=config.eval.maximize,
        )
        # Closing waits for a save that is being written, whatever ended the run.
        with contextlib.closing(keeper):
            state, origin = self.initial_state(keeper, mode)
            writer = metrics.Writer(self.folder, int(state.step))
            with contextlib.closing(writer):
                self._train_or_evaluate(mode, state, origin, keeper, writer)

    def _train_or_evaluate(self, mode: str, state, origin: str, keeper, writer) -> None:
        config, step = self.config, int(state.step)
        screen = progress.Screen(config.train.batch_size)
        screen.say(
            f"{config.task} in {self.folder} on {self.mesh.size} {jax.default_backend()} devices\n"
            f"data: {self.source.description}\n"
            f"{self.steps} updates of {config.train.batch_size} images; {origin}"
        )
        if mode == "eval" or step >= self.steps:
            eval_step = evaluate.make_eval_step(self.task, config.seed)
            scores = train.run_evaluation(
                self.task, state, eval_step, self.split_batches, config, writer
            )
            screen.evaluated(step, scores)
            if keeper.latest() is None:  # a run of no updates still hands its weights on
                keeper.save(state, scores)
        else:
            train.train(
                self.task,
                state,
                self.train_step,
                self.train_batches(step),
                self.split_batches,
                config=config,
                total_steps=self.steps,
                keeper=keeper,
                writer=writer,
                screen=screen,
            )

    def create_state(self, key: jax.Array, encoder=None) -> train.TrainState:
        """The state before the first update, its encoder taken from `encoder` where given."""
        params, model_state = self.task.init(key)
        if encoder is not None:
            params = params | {"encoder": encoder}
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
        if keeper.latest() is not None:
            state = keeper.restore(abstract)
            return state, f"resuming at update {int(state.step)}"
        if mode == "eval":
            raise UserError(f"{self.folder} holds no finished checkpoint to evaluate.")
        encoder, origin = None, "starting from fresh weights"
        if self.config.init.path:
            weights = checkpoint.load_weights(self.config.init.path, "init.path")
            params, origin = checkpoint.warm_start(abstract.params, weights)
            encoder = params["encoder"]
        placed = jax.tree.map(lambda x: x.sharding, abstract)
        create = jax.jit(self.create_state, out_shardings=placed)
        return create(jax.random.key(self.config.seed), encoder), origin

    def train_batches(self, start: int):
        """Endless global batches on the devices, from batch number `start`."""
        data = self.config.data
        batches = pipeline.train_batches(
            self.source,
            self.task.views,
            pipeline.Augmentation(tuple(data.crop_scale), tuple(data.crop_ratio), data.flip),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            start=start,
            **self._reading(),
        )
        return (sharding.put_batch(batch, self.mesh) for batch in batches)

    def split_batches(self, split: str):
        """Every example of a split once, padded to whole batches, on the devices."""
        batches = pipeline.eval_batches(
            self.source if split == self.config.data.train_split else self._open(split),
            self.task.views,
            batch_size=self.config.eval.batch_size,
            eval_crop=self.config.data.eval_crop,
            **self._reading(),
        )
        return (sharding.put_batch(batch, self.mesh) for batch in batches)

    def _open(self, split: str) -> sources.Source:
        data = self.config.data
        return sources.open_source(data.source, split, data_dir=data.data_dir, holdout=data.holdout)

    def _reading(self) -> dict:
        data = self.config.data
        return dict(
            channels=data.channels,
            max_value=data.max_value,
            workers=data.workers,
            max_bad_share=data.max_bad_share,
            bad_files=self.folder / "bad_files.txt",
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def with_optimizer(task: Task, config, steps: int, examples: int):
    """The optax chain, and the task with its schedules logged."""
    c = config.optimizer
    warmup = c.warmup_steps or round(c.warmup_epochs * examples / config.train.batch_size)
    peak = optimizer.scaled_learning_rate(
        c.learning_rate, reference_batch=c.reference_batch, batch_size=config.train.batch_size
    )
    if steps == 0:  # a run that only evaluates its initial weights
        steps, warmup = 1, 0
    schedule = optimizer.warmup_cosine(peak, c.final_learning_rate, warmup, steps)
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
    logged = {"lr": schedule, "weight_decay": lambda _: jax.numpy.float32(c.weight_decay)}
    return task._replace(schedules={**task.schedules, **logged}), chain


def store_config(run: Path, config: ConfigDict) -> None:
    """Creates the run's folder with its resolved config."""
    if jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
