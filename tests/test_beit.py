"""Masked image model and classifier against the official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import checkpoint, indices, load, nhwc, random_params, shapes, weights

from beit_jax.errors import UserError
from beit_jax.interop.beit import official
from beit_jax.interop.table import export_params
from beit_jax.models.beit import Classifier, MaskedImageModel
from beit_jax.models.layers import FINETUNE_INIT
from beit_jax.models.vit import ViT

# Draws from this generator compile much faster than the default one's.
FAST_KEY = jax.random.key(0, impl="rbg")
TINY = dict(patch_size=16, width=48, depth=3, heads=3)
GRID = (4, 4)


def mim(name):
    """Model, official weights, reference numbers and inputs of one golden folder."""
    plain = dict(positions="absolute", layer_scale=0.0) if name.endswith("abs") else {}
    model = MaskedImageModel(ViT(**TINY, **plain), vocabulary=64)
    golden = load(f"{name}/tensors")
    inputs = nhwc(golden["image"]), indices(golden["mask"])
    params = weights(model, official(GRID), checkpoint(f"{name}/checkpoint"), *inputs)
    return model, params, golden, inputs


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean()


@pytest.mark.parametrize("name", ["beit_pretrain", "beit_pretrain_abs"])
def test_masked_logits_agree_with_the_official_code(name):
    model, params, golden, inputs = mim(name)
    (logits,) = jax.jit(model.apply)({"params": params}, *inputs)
    assert logits.shape == (2, 6, 64) and logits.dtype == jnp.float32
    expected = golden["logits"][golden["mask"]]
    np.testing.assert_allclose(logits.reshape(12, 64), expected, atol=1e-5)


def test_loss_and_gradients_agree_with_the_official_code():
    model, params, golden, (images, masked) = mim("beit_pretrain")
    labels = jnp.take_along_axis(jnp.asarray(golden["labels"], jnp.int32), masked, axis=1)

    def loss_fn(params):
        return cross_entropy(model.apply({"params": params}, images, masked)[0], labels)

    loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    gradients = export_params(official(GRID), gradients)
    names = [name for name in golden if name.startswith("grad/")]
    assert len(names) == 8
    for name in names:
        scale = np.abs(golden[name]).max()
        ours = gradients[name.removeprefix("grad/")]
        np.testing.assert_allclose(ours, golden[name], rtol=0, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("name", "positions", "pooling"),
    [("beit_finetune", "relative", "mean"), ("beit_finetune_cls", "absolute+relative", "cls")],
)
def test_classifier_agrees_with_the_official_code(name, positions, pooling):
    model = Classifier(ViT(**TINY, positions=positions, initial=FINETUNE_INIT), 10, pooling)
    golden = load(f"{name}/tensors")
    images, labels = nhwc(golden["image"]), jnp.asarray(golden["labels"], jnp.int32)
    params = weights(model, official(GRID), checkpoint(f"{name}/checkpoint"), images)

    def loss_fn(params):
        logits = model.apply({"params": params}, images)
        return cross_entropy(logits, labels), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    gradients = export_params(official(GRID), gradients)
    for name in (name for name in golden if name.startswith("grad/")):
        scale = np.abs(golden[name]).max()
        ours = gradients[name.removeprefix("grad/")]
        np.testing.assert_allclose(ours, golden[name], rtol=0, atol=1e-4 * scale, err_msg=name)


def test_initial_heads():
    images, masked = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 2), jnp.int32)
    tiny = TINY | {"depth": 1}
    model = MaskedImageModel(ViT(**tiny), 500)
    params = jax.jit(model.init)(FAST_KEY, images, masked)["params"]
    np.testing.assert_allclose(params["lm_head"]["kernel"].std(), 0.0108, rtol=0.05)
    model = Classifier(ViT(**tiny, initial=FINETUNE_INIT), 500, head_scale=0.001)
    params = jax.jit(model.init)(FAST_KEY, images)["params"]
    np.testing.assert_allclose(params["head"]["kernel"].std(), 2e-5, rtol=0.05)
    assert not params["head"]["bias"].any()


def test_logits_are_float32_sums_in_bfloat16_too():
    images = np.random.default_rng(0).standard_normal((2, 32, 48, 3), np.float32)
    masked = np.array([[0, 5], [2, 3]])
    tiny = TINY | {"depth": 1}
    full = MaskedImageModel(ViT(**tiny), 64)
    half = MaskedImageModel(ViT(**tiny, dtype=jnp.bfloat16), 64)
    variables = {"params": random_params(full, images, masked)}
    low, high = (jax.jit(model.apply)(variables, images, masked)[0] for model in (half, full))
    assert low.dtype == jnp.float32
    # More bits than bfloat16 holds: the sums were not rounded on their way out.
    assert (low != low.astype(jnp.bfloat16).astype(jnp.float32)).any()
    np.testing.assert_allclose(low, high, atol=0.05 * float(np.abs(high).max()))
    gradient = jax.grad(lambda v: jnp.sum(half.apply(v, images, masked)[0] ** 2))
    gradient = jax.eval_shape(gradient, variables)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


def test_unknown_pooling_names_the_key():
    with pytest.raises(UserError, match="config.model.pooling"):
        shapes(Classifier(ViT(**TINY), 10, "max"), jnp.zeros((1, 32, 32, 3)))
