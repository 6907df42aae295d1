"""Twenty updates of BEiT and of BEiT v2, beside the same twenty of the official code.

The losses alone would pass with a wrong weight decay or beta, so the weights at the end count too.
"""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import GOLDEN, checkpoint, indices, load, nhwc, weights

from beit_jax.interop.beit import official
from beit_jax.interop.table import export_params
from beit_jax.losses import cross_entropy
from beit_jax.models.beit import MaskedImageModel
from beit_jax.models.vit import ViT
from beit_jax.optimizer import make_optimizer, warmup_cosine

pytestmark = pytest.mark.smoke

TABLE = official((4, 4))
TINY = ViT(patch_size=8, width=32, depth=3, heads=2)
# Model and beta_2 of each training.
TRAININGS = {
    "beit_pretrain": (MaskedImageModel(TINY, 40), 0.999),
    "beitv2_pretrain": (MaskedImageModel(TINY, 40, early_layers=2, head_layers=1), 0.98),
}


@cache
def batches():
    """(images, masked indices, their tokens) of each update."""
    data = load("trajectories/batches")
    result = []
    for images, mask, tokens in zip(data["images"], data["masks"], data["tokens"], strict=True):
        labels = jnp.asarray(tokens[mask].reshape(len(mask), -1), jnp.int32)
        result.append((nhwc(images), indices(mask), labels))
    return result


@cache
def loss_and_gradients(model):
    def loss_fn(params, images, masked, labels):
        heads = model.apply({"params": params}, images, masked)
        return sum(cross_entropy(logits, labels).mean() for logits in heads)

    return jax.jit(jax.value_and_grad(loss_fn))


def official_run(name):
    return json.loads((GOLDEN / f"trajectories/{name}/trajectory.json").read_text())


def run(name, **changes):
    """Losses, gradient norms and final weights (official names) of the whole training."""
    model, b2 = TRAININGS[name]
    schedule = warmup_cosine(peak=2e-3, final=1e-5, warmup_steps=4, total_steps=20)
    rates = official_run(name)["lr"]
    np.testing.assert_allclose([schedule(i) for i in range(20)], rates, rtol=1e-4)
    settings = dict(schedule=schedule, b1=0.9, b2=b2, eps=1e-8, weight_decay=0.05, clip=3.0)
    images, masked, _ = batches()[0]
    params = weights(model, TABLE, checkpoint(f"trajectories/{name}/start"), images, masked)
    optimizer = make_optimizer(params, **settings | changes, layer_decay=1.0, depth=3)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradients)

    losses, norms = [], []
    for batch in batches():
        loss, gradients = loss_and_gradients(model)(params, *batch)
        params, state, norm = update(params, state, gradients)
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms, export_params(TABLE, params)


def furthest(name, tensors):
    """The largest difference from the official weights after the last update."""
    end = checkpoint(f"trajectories/{name}/end")
    assert set(tensors) == set(end)
    return max(np.abs(tensors[key] - end[key]).max() for key in end)


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_and_final_weights_are_the_official_ones(name):
    losses, norms, tensors = run(name)
    expected = official_run(name)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, expected["grad_norms"], rtol=1e-4)
    assert furthest(name, tensors) < 2e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("beit_pretrain", dict(weight_decay=0.0)),
        ("beit_pretrain", dict(b2=0.99)),
        ("beitv2_pretrain", dict(b2=0.999)),
    ],
)
def test_a_wrong_optimizer_is_seen_in_the_weights(name, change):
    """The broken twins: what this comparison is there to catch does not slip through."""
    _, _, tensors = run(name, **change)
    assert furthest(name, tensors) > 1e-4
