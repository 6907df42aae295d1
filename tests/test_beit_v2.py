"""BEiT v2's CLS branch against the official code, and how its blocks start and drop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from golden_files import checkpoint, indices, load, nhwc, random_params, shapes, weights

from beit_jax import limits
from beit_jax.errors import UserError
from beit_jax.interop.beit import official
from beit_jax.interop.table import export_params
from beit_jax.losses import cross_entropy
from beit_jax.models.beit import MaskedImageModel
from beit_jax.models.layers import Block
from beit_jax.models.vit import ViT

TABLE = official((4, 4))
TINY = ViT(patch_size=16, width=48, depth=3, heads=3)
IMAGES, MASKED = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 6), jnp.int32)
SHARED = {"beitv2_pretrain": True, "beitv2_pretrain_unshared": False}


@pytest.fixture(scope="module", params=SHARED)
def case(request):
    """Model, its official weights under both names, and reference numbers."""
    name = request.param
    model = MaskedImageModel(TINY, 64, early_layers=2, head_layers=1, shared_head=SHARED[name])
    tensors = checkpoint(f"{name}/checkpoint")
    return model, weights(model, TABLE, tensors, IMAGES, MASKED), tensors, load(f"{name}/tensors")


def test_logits_loss_and_gradients_agree_with_the_official_code(case):
    model, params, _, golden = case
    images, masked = nhwc(golden["image"]), indices(golden["mask"])
    everywhere = jnp.broadcast_to(jnp.arange(16), (2, 16))
    labels = jnp.asarray(golden["labels"], jnp.int32)
    weight = jnp.asarray(golden["mask"]) / golden["mask"].sum()

    def loss_fn(params):
        heads = model.apply({"params": params}, images, masked, read=everywhere)
        losses = [(cross_entropy(logits, labels) * weight).sum() for logits in heads]
        return sum(losses), (heads, losses, model.apply({"params": params}, images, masked))

    found, gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    _, (heads, losses, read_by_default) = found
    for logits, loss, name in zip(heads, losses, ("mim", "cls"), strict=True):
        expected = golden["logits" if name == "mim" else "cls_logits"]
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(loss, golden[f"loss_{name}"], rtol=1e-5)
    for logits, everywhere in zip(read_by_default, heads, strict=True):
        expected = everywhere[golden["mask"]].reshape(logits.shape)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    gradients = export_params(TABLE, gradients)
    names = [name for name in golden if name.startswith("grad/")]
    assert len(names) == 5
    for name in names:
        scale = np.abs(golden[name]).max()
        ours = gradients[name.removeprefix("grad/")]
        np.testing.assert_allclose(ours, golden[name], rtol=0, atol=1e-4 * scale, err_msg=name)


def test_round_trip_is_exact(case):
    _, params, tensors, _ = case
    exported = export_params(TABLE, params)
    assert set(exported) == set(tensors)
    for name, value in exported.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_the_branch_starts_as_officially():
    """Its blocks keep PyTorch's own start, biases included; its head starts like the other one."""
    vit = ViT(patch_size=16, width=64, depth=2, heads=2, positions="absolute")
    model = MaskedImageModel(vit, 300, early_layers=1, shared_head=False)
    images, masked = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), images, masked)["params"]
    for j in range(2):
        block = params[f"cls_block_{j}"]
        output = (2 * (1 + j + 1)) ** -0.5
        layers = {
            "qkv": (block["attn"]["qkv"], 64, 1),
            "proj": (block["attn"]["proj"], 64, output),
            "fc1": (block["mlp"]["fc1"], 64, 1),
            "fc2": (block["mlp"]["fc2"], 256, output),
        }
        for name, (layer, fan_in, scale) in layers.items():
            bound = fan_in**-0.5
            largest = np.abs(layer["kernel"]).max()
            np.testing.assert_allclose(largest, bound * scale, rtol=0.03, err_msg=name)
            np.testing.assert_allclose(
                layer["kernel"].std(), bound * scale / 3**0.5, rtol=0.05, err_msg=name
            )
            if name != "qkv":
                np.testing.assert_allclose(np.abs(layer["bias"]).max(), bound, rtol=0.15)
        assert not block["attn"]["q_bias"].any() and not block["attn"]["v_bias"].any()
        assert (block["gamma_1"] == np.float32(0.1)).all()
    for name in ("lm_head", "cls_lm_head"):
        np.testing.assert_allclose(params[name]["kernel"].std(), 0.0108, rtol=0.05)
        assert not params[name]["bias"].any()


def test_a_branch_of_two_blocks_says_of_the_masked_patches_what_it_says_among_all():
    model = MaskedImageModel(TINY, 64, early_layers=2, head_layers=2)
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), np.float32)
    masked, everywhere = np.array([[3, 14], [9, 0]]), np.tile(np.arange(16), (2, 1))
    params = random_params(model, images, masked)
    apply = jax.jit(model.apply)
    found = apply({"params": params}, images, masked)
    expected = apply({"params": params}, images, masked, read=everywhere)
    for ours, all_of_them in zip(found, expected, strict=True):
        picked = np.take_along_axis(np.asarray(all_of_them), masked[:, :, None], axis=1)
        np.testing.assert_allclose(ours, picked, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "early", "expected"),
    [(12, 9, (0.33 * 9 / 11, 0.33 * 10 / 11)), (3, 2, (0.33 * 2 / 3, 0.33))],
)
def test_stochastic_depth_goes_on_in_the_branch(depth, early, expected):
    vit = ViT(patch_size=16, width=4, depth=depth, heads=1, drop_path=0.33)
    model = MaskedImageModel(vit, 5, early_layers=early)
    rates, shared = {}, {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, Block) and context.method_name == "__call__":
            _, bias, keys, _ = args
            assert keys.shape == (1,)
            rates[context.module.name] = context.module.drop_path
            shared[context.module.name] = bias
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        inputs = jnp.zeros((1, 32, 32, 3)), MASKED[:, :1], jax.random.split(jax.random.key(0), 1)
        jax.eval_shape(model.init, jax.random.key(0), *inputs)
    np.testing.assert_allclose([rates["cls_block_0"], rates["cls_block_1"]], expected)
    np.testing.assert_allclose([rates[f"block_{i}"] for i in (0, depth - 1)], [0, 0.33])
    assert shared["cls_block_0"] is shared["block_0"] is not None


def test_a_branch_without_blocks_is_refused():
    limits.check(tiny.config("mim", model__early_layers=0, model__head_layers=0))
    with pytest.raises(UserError, match="config.model.head_layers=0 must be above 0"):
        limits.check(tiny.config("mim", model__early_layers=1, model__head_layers=0))


def test_a_branch_of_all_blocks_names_the_key():
    with pytest.raises(UserError, match="config.model.early_layers of 3"):
        shapes(MaskedImageModel(TINY, 64, early_layers=3), IMAGES, MASKED)
