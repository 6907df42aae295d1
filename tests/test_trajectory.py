"""Twenty updates of masked image modelling, beside the same twenty of the official code.

The losses alone would pass with a wrong weight decay or beta, so the weights at the end count too.
"""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import GOLDEN, indices, load, nhwc, weights

from beit_jax.interop.beit import official
from beit_jax.interop.table import export_params
from beit_jax.losses import cross_entropy
from beit_jax.models.beit import MaskedImageModel
from beit_jax.models.vit import ViT
from beit_jax.optimizer import make_optimizer, warmup_cosine

pytestmark = pytest.mark.smoke

TABLE = official((4, 4))
EXPECTED = json.loads((GOLDEN / "trajectories/beit_pretrain/trajectory.json").read_text())
MODEL = MaskedImageModel(ViT(patch_size=8, width=32, depth=3, heads=2), vocabulary=40)


@cache
def batches():
    """(images, masked indices, their tokens) of each update."""
    data = load("trajectories/batches")
    result = []
    for images, mask, tokens in zip(data["images"], data["masks"], data["tokens"], strict=True):
        labels = jnp.asarray(tokens[mask].reshape(len(mask), -1), jnp.int32)
        result.append((nhwc(images), indices(mask), labels))
    return result


@jax.jit
def loss_and_gradients(params, images, masked, labels):
    def loss_fn(params):
        (logits,) = MODEL.apply({"params": params}, images, masked)
        return cross_entropy(logits, labels).mean()

    return jax.value_and_grad(loss_fn)(params)


def run(**changes):
    """Losses, gradient norms and final weights (official names) of the whole training."""
    schedule = warmup_cosine(peak=2e-3, final=1e-5, warmup_steps=4, total_steps=20)
    np.testing.assert_allclose([schedule(i) for i in range(20)], EXPECTED["lr"], rtol=1e-4)
    settings = dict(schedule=schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, clip=3.0)
    images, masked, _ = batches()[0]
    params = weights(MODEL, TABLE, load("trajectories/beit_pretrain/start"), images, masked)
    optimizer = make_optimizer(params, **settings | changes, layer_decay=1.0, depth=3)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradients)

    losses, norms = [], []
    for batch in batches():
        loss, gradients = loss_and_gradients(params, *batch)
        params, state, norm = update(params, state, gradients)
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms, export_params(TABLE, params)


def furthest(tensors):
    """The largest difference from the official weights after the last update."""
    end = load("trajectories/beit_pretrain/end")
    assert set(tensors) == set(end)
    return max(np.abs(tensors[name] - end[name]).max() for name in end)


def test_losses_and_final_weights_are_the_official_ones():
    losses, norms, tensors = run()
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, EXPECTED["grad_norms"], rtol=1e-4)
    assert furthest(tensors) < 2e-5


@pytest.mark.parametrize("change", [dict(weight_decay=0.0), dict(b2=0.99)])
def test_a_wrong_optimizer_is_seen_in_the_weights(change):
    """The broken twins: what this comparison is there to catch does not slip through."""
    _, _, tensors = run(**change)
    assert furthest(tensors) > 1e-4
