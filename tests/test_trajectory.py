"""Twenty updates of each training, beside the same twenty of the official code.

The losses alone would pass with a wrong weight decay or beta, so the weights at the end count too.
"""

import json
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from golden_files import GOLDEN, checkpoint, indices, load, nhwc

from beit_jax.architecture import variables_of
from beit_jax.interop import beit, vqkd
from beit_jax.interop.table import Table, import_params, within
from beit_jax.losses import cross_entropy
from beit_jax.models import quantizer
from beit_jax.models.beit import Classifier, MaskedImageModel
from beit_jax.models.layers import FINETUNE_INIT
from beit_jax.models.vit import ViT
from beit_jax.models.vqkd import VQKD, map_pixels
from beit_jax.optimizer import make_optimizer, warmup_cosine

pytestmark = pytest.mark.smoke


class Training(NamedTuple):
    """What tells one training from another; all else is in its trajectory.json, and the same."""

    model: nn.Module
    table: Table  # of all the network's variables
    batch: Callable  # arrays of one update, by name -> the network's inputs, targets
    loss: Callable  # outputs, targets, state (other collections), settings -> loss, next state
    settings: tuple[str, ...] = ()  # those that the loss reads


def masked_patches(images, masks, tokens, **_):
    labels = jnp.asarray(tokens[masks].reshape(len(masks), -1), jnp.int32)
    return (nhwc(images), indices(masks)), labels


def token_loss(heads, labels, state, settings):
    return sum(cross_entropy(logits, labels).mean() for logits in heads), state


def labelled_images(images, labels, **_):
    return (nhwc(images),), jnp.asarray(labels, jnp.int32)


def class_loss(logits, labels, state, settings):
    return cross_entropy(logits, labels, settings["label_smoothing"]).mean(), state


def imitated_images(images01, teacher_targets, **_):
    return (map_pixels(nhwc(images01)),), teacher_targets


def imitation_loss(found, targets, state, settings):
    codebook, (tokens, normalized, _, commitment) = state["codebook"], found.quantized
    unit = [quantizer.normalize(features) for features in (found.features, targets)]
    cosine = jnp.sum(unit[0] * unit[1], axis=-1)
    statistics = quantizer.statistics(normalized, tokens, len(codebook["usage"]))
    codebook = quantizer.follow(codebook, statistics, settings["decay"])
    return commitment.mean() + (1 - cosine).mean(), {"codebook": codebook}


SCHEDULE = warmup_cosine(peak=2e-3, final=1e-5, warmup_steps=4, total_steps=20)
TINY = ViT(patch_size=8, width=32, depth=3, heads=2)
RELATIVE = TINY.clone(positions="relative", initial=FINETUNE_INIT)
PLAIN = TINY.clone(positions="absolute", layer_scale=0.0, depth=2, initial=FINETUNE_INIT)
_PARAMS = beit.official((4, 4))
BEIT = Table("official BEiT", within("params", _PARAMS.rules), within("params", _PARAMS.buffers))
TRAININGS = {
    "beit_pretrain": Training(MaskedImageModel(TINY, 40), BEIT, masked_patches, token_loss),
    "beitv2_pretrain": Training(
        MaskedImageModel(TINY, 40, early_layers=2, head_layers=1), BEIT, masked_patches, token_loss
    ),
    "finetune": Training(
        Classifier(RELATIVE, 5), BEIT, labelled_images, class_loss, ("label_smoothing",)
    ),
    "vqkd": Training(
        VQKD(PLAIN, PLAIN.clone(patch_size=1, depth=1), 40, code_width=8, teacher_width=24),
        vqkd.official(40, 8),
        imitated_images,
        imitation_loss,
        ("decay",),
    ),
}


def official_run(name):
    return json.loads((GOLDEN / f"trajectories/{name}/trajectory.json").read_text())


@cache
def batches(name):
    """(the network's inputs, targets) of each update."""
    data = load("trajectories/batches")
    rows = [{key: array[i] for key, array in data.items()} for i in range(20)]
    return [TRAININGS[name].batch(**row) for row in rows]


@cache
def official_variables(name, when):
    """The network's variables at the "start" or the "end", complete and nothing left over."""
    training, (inputs, _) = TRAININGS[name], batches(name)[0]
    tensors = checkpoint(f"trajectories/{name}/{when}")
    return import_params(training.table, tensors, dict(variables_of(training.model, *inputs)))


@cache
def loss_and_gradients(name, **settings):
    training = TRAININGS[name]

    def loss_fn(params, state, inputs, targets):
        found = training.model.apply({"params": params, **state}, *inputs)
        return training.loss(found, targets, state, settings)

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


@cache
def init_and_update(name, **settings):
    """Of the optimizer: its first state, and one update as a compiled function."""
    params = official_variables(name, "start")["params"]
    optimizer = make_optimizer(params, schedule=SCHEDULE, depth=3, **settings)

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradients)

    return optimizer.init(params), update


def run(name, **changes):
    """Losses, gradient norms and final variables of the whole training.

    `changes` are to the settings of the official run, by their names there.
    """
    training, settings = TRAININGS[name], official_run(name) | changes
    gradients_of = loss_and_gradients(name, **{key: settings[key] for key in training.settings})
    b1, b2 = settings["betas"]
    optimizer_state, update = init_and_update(
        name,
        b1=b1,
        b2=b2,
        clip=settings["clip_grad_norm"] or 0.0,
        **{key: settings[key] for key in ("eps", "weight_decay", "layer_decay")},
    )
    state = dict(official_variables(name, "start"))
    params, losses, norms = state.pop("params"), [], []
    for batch in batches(name):
        (loss, state), gradients = gradients_of(params, state, *batch)
        params, optimizer_state, norm = update(params, optimizer_state, gradients)
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms, {"params": params, **state}


def furthest(name, variables):
    """The largest difference from the official variables after the last update."""
    differences = jax.tree.map(
        lambda ours, theirs: np.abs(ours - theirs).max(), variables, official_variables(name, "end")
    )
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_and_final_weights_are_the_official_ones(name):
    losses, norms, variables = run(name)
    expected = official_run(name)
    np.testing.assert_allclose([SCHEDULE(i) for i in range(20)], expected["lr"], rtol=1e-4)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, expected["grad_norms"], rtol=1e-4)
    assert furthest(name, variables) < 2e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("beit_pretrain", dict(weight_decay=0.0)),
        ("beitv2_pretrain", dict(betas=(0.9, 0.999))),
        ("finetune", dict(layer_decay=1.0)),
        ("finetune", dict(label_smoothing=0.0)),
        ("vqkd", dict(decay=0.98)),
    ],
)
def test_a_wrong_setting_is_seen_in_the_weights(name, change):
    """The broken twins: what this comparison is there to catch does not slip through."""
    _, _, variables = run(name, **change)
    assert furthest(name, variables) > 1e-4
