"""Linear probe: linear classifiers on the frozen features of every block of an encoder, at once.

Each block's CLS, mean of the patches, and both side by side have a head for every learning rate of
`config.probe.learning_rates`. The heads share nothing but the encoder's one pass: their losses are
summed, and neither Adam nor weight decay mixes them, so each is what it would have become alone.
Source: beit/run_linear_eval.py, lines 107-207, whose heads are those of "both" at factor 1.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import checkpoint, class_names, evaluate, feature_scores, features, losses
from beit_jax.augment import color_jitter, to_unit
from beit_jax.data.pipeline import View
from beit_jax.data.record import Source
from beit_jax.errors import UserError
from beit_jax.frozen import frozen_network
from beit_jax.optimizer import scaled_learning_rate
from beit_jax.task import Purpose, Task, Weights, example_weights, keys_for, mean_of_sums

POOLINGS = {"cls": 1, "mean": 1, "both": 2}  # and their widths, in widths of the encoder
INITIAL = 0.01  # standard deviation of the heads' weights


class Backbone(NamedTuple):
    """A frozen encoder."""

    params: Mapping[str, Any]
    config: Mapping[str, Any]  # its run's, but for what it computes in
    extract: Callable  # features.make_extractor's


class Probing(NamedTuple):
    """The heads of a frozen encoder, and the task's functions over them.

    Heads are laid out as P poolings x blocks x R learning rates.
    """

    backbone: Backbone
    classes: int
    config: Any

    def init(self, key):
        model, rates = self.backbone.config["model"], len(self.config.probe.learning_rates)
        heads = {}
        for number, (pooling, widths) in enumerate(POOLINGS.items()):
            shape = (model["depth"], rates, widths * model["width"], self.classes)
            kernel = INITIAL * jax.random.normal(jax.random.fold_in(key, number), shape)
            heads[pooling] = {"kernel": kernel, "bias": jnp.zeros((*shape[:2], self.classes))}
        return {"heads": heads}, {}

    def loss_fn(self, params, model_state, frozen, batch, keys, step):
        images = batch["image"]
        if strength := self.config.data.color_jitter:
            jittering = keys_for(keys, Purpose.JITTER)
            (images,) = color_jitter(jittering, (to_unit(images),), strength)
        loss, hits, count = self.sums(params, frozen, images, batch)
        return (loss, count), ({}, {"loss": (loss, count), "accuracy": (hits.mean(), count)})

    def eval_fn(self, params, model_state, frozen, batch, keys):
        loss, hits, count = self.sums(params, frozen, batch["image"], batch)
        return {"loss": (loss, count), "hits": (hits, count)}

    def predict(self, weights: Weights, batch):
        """Class probabilities of every head, float32 [B, P, blocks, R, C]."""
        return jax.nn.softmax(self.logits(weights.params, weights.frozen, batch["image"]))

    def logits(self, params, frozen, images) -> jax.Array:
        """Logits float32 [B, P, blocks, R, C] of images, uint8 or in [0, 1]."""
        found = self.backbone.extract(frozen["encoder"], images)
        found["both"] = jnp.concatenate([found["cls"], found["mean"]], axis=-1)
        heads = [params["heads"][pooling] for pooling in POOLINGS]
        products = [
            jnp.einsum("nbd,brdc->nbrc", found[pooling], head["kernel"]) + head["bias"][None]
            for pooling, head in zip(POOLINGS, heads, strict=True)
        ]
        return jnp.stack(products, axis=1)

    def sums(self, params, frozen, images, batch):
        """Loss of all heads together, right answers [P, blocks, R] of each, labelled images."""
        logits = self.logits(params, frozen, images)
        # Images without a label (-1), such as files beside the class folders, weigh nothing.
        weight = example_weights(batch) * (batch["label"] >= 0)
        labels = jnp.broadcast_to(batch["label"][:, None, None, None], logits.shape[:-1])
        loss = losses.cross_entropy(logits, labels).sum((1, 2, 3))
        hits = (logits.argmax(-1) == labels) * weight[:, None, None, None]
        return (loss * weight).sum(), hits.sum(0), weight.sum()

    def finalize(self, sums) -> dict[str, jax.Array]:
        """Means; in an evaluation the accuracy of every head, heads/<pooling>_<block>_<rate>."""
        sums = dict(sums)
        hits, count = sums.pop("hits", (None, None))
        values = mean_of_sums(sums)
        if hits is not None:
            for place in np.ndindex(*hits.shape):
                pooling, block, rate = self.head(place)
                values[f"heads/{pooling}_{block}_{rate:g}"] = hits[place] / count
        return values

    def head(self, place: tuple[int, int, int]) -> tuple[str, int, float]:
        """Pooling, block (from 0) and peak learning rate of a head."""
        pooling, block, rate = place
        optimizer, factors = self.config.optimizer, self.config.probe.learning_rates
        peak = scaled_learning_rate(
            optimizer.learning_rate,
            reference_batch=optimizer.reference_batch,
            batch_size=self.config.train.batch_size,
        )
        return list(POOLINGS)[pooling], block, peak * factors[rate]

    def scale_updates(self, updates):
        """Gives each head its own learning rate."""
        factors = jnp.array(self.config.probe.learning_rates)
        return jax.tree.map(
            lambda update: update * factors.reshape(1, -1, *(1,) * (update.ndim - 2)), updates
        )

    def choose(self, select, test) -> dict[str, float]:
        """The head with most hits in `select`, and how it does in `test`: (hits, images) each."""
        place = np.unravel_index(select[0].argmax(), select[0].shape)
        pooling, block, rate = self.head(place)
        return {
            "probe": test[0][place] / test[1],
            "probe_block": block,
            "probe_from_cls": int(pooling != "mean"),
            "probe_from_mean": int(pooling != "cls"),
            "probe_learning_rate": rate,
        }


def build(config, source: Source, run: Path) -> Task:
    """Builds the probes of the encoder at `config.init.path`."""
    class_names.refuse_fewer_than_two(config, source.class_names)
    if config.eval.probe:
        raise UserError(
            "config.eval.probe=True has no place in a run of task probe, which is one by itself; "
            "set it to False."
        )
    class_names.check(run, source, source.class_names)
    backbone, copies = _backbone(config, run)
    parts = Probing(backbone, len(source.class_names), config)
    data = backbone.config["data"]
    return Task(
        views={"image": View(tuple(data["image_size"]), data["interpolation"])},
        init=parts.init,
        loss_fn=parts.loss_fn,
        eval_fn=parts.eval_fn,
        finalize=parts.finalize,
        frozen={"encoder": backbone.params},
        copies=copies,
        frozen_init=True,
        scale_updates=parts.scale_updates,
        predict=parts.predict,
        class_names=source.class_names,
        evaluators=_evaluators(parts, source),
    )


def _evaluators(parts: Probing, source: Source) -> dict[str, Callable]:
    """The choice among the heads and, where asked for, k-NN on the same features."""
    config = parts.config

    @jax.jit
    def hits(weights: Weights, batch):
        return parts.eval_fn(weights.params, {}, weights.frozen, batch, None)["hits"]

    def choice(weights: Weights, batches):
        select_split, eval_split = config.eval.select_split, config.data.eval_split

        def count(split: str):
            return jax.device_get(evaluate.add_up(partial(hits, weights), batches(split)))

        select = count(select_split)
        return parts.choose(select, select if eval_split == select_split else count(eval_split)), {}

    evaluators = {"heads": choice}
    if config.eval.knn:
        network = config.copy_and_resolve_references()
        with network.unlocked():
            network.model = parts.backbone.config["model"]
        score = feature_scores.make_evaluator(network, source)
        evaluators["features"] = lambda weights, batches: score(
            weights._replace(params=weights.frozen), batches
        )
    return evaluators


def _backbone(config, run: Path):
    def make(weights: checkpoint.Weights, named: str) -> Backbone:
        theirs = weights.config
        if "patch_embed" not in weights.params.get("encoder", {}):
            raise UserError(
                f"{named}: {weights.source} is of task {theirs['task']!r} and holds no encoder; "
                "name a run of task mim or classify, or an imported encoder."
            )
        for key in ("image_size", "channels"):
            if theirs["data"][key] != config.data[key]:
                value = str(theirs["data"][key]).replace(" ", "")
                raise UserError(
                    f"{named}: the encoder at {weights.source} was trained with data.{key}="
                    f"{value}, but here it is {config.data[key]}; give "
                    f"'--config.data.{key}={value}'."
                )
        theirs = {**theirs, "model": {**theirs["model"], "dtype": config.model.dtype}}
        return Backbone(weights.params["encoder"], theirs, features.make_extractor(theirs))

    advice = (
        "a probe needs an encoder; train one with `python -m beit_jax.main "
        "--config=configs/mim_base.py` and give its run folder, --config.init.path=runs/mim_base."
    )
    return frozen_network(run, "init", config.init.path, make, advice)
