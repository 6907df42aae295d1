"""The encoder: structure, positions, behaviour seen through gradients, compute dtype."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_files import random_params, shapes

from beit_jax.errors import UserError
from beit_jax.models.layers import FINETUNE_INIT, at_tokens
from beit_jax.models.vit import POSITIONS, ViT

# Draws from this generator compile much faster than the default one's.
FAST_KEY = jax.random.key(3, impl="rbg")
TINY = dict(patch_size=4, width=24, depth=2, heads=3)
# 2 x 3 patches, five channels.
IMAGES = np.random.default_rng(1).standard_normal((4, 8, 12, 5), np.float32)
READ = np.array([[0, 5], [2, 1], [6, 3], [4, 4]])  # tokens


def apply(module, params, *inputs):
    """The states after every block, compiled as one."""
    return jax.jit(module.apply)({"params": params}, *inputs).states


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_kind_of_positions(positions):
    module = ViT(**TINY, positions=positions)
    flat = flatten_dict(random_params(module, IMAGES), sep="/")
    names = set(flat)
    kinds = positions.split("+")
    assert ("pos_embed" in names) == ("absolute" in kinds)
    assert ("relative_position_bias/table" in names) == ("shared_relative" in kinds)
    for i in range(2):
        table = f"block_{i}/attn/relative_position_bias/table"
        assert (table in names) == ("relative" in kinds)
    states = apply(module, unflatten_dict(flat, sep="/"), IMAGES)
    assert len(states) == 2 and all(state.shape == (4, 7, 24) for state in states)
    for name in names:
        if "pos" in name:  # each of them counts
            without = unflatten_dict(flat | {name: 0 * flat[name]}, sep="/")
            assert np.abs(apply(module, without, IMAGES)[-1] - states[-1]).max() > 1e-3


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared_relative"])
def test_fused_attention_changes_nothing_but_rounding(positions, monkeypatch):
    module = ViT(**TINY, positions=positions, dtype=jnp.bfloat16)
    params = random_params(module, IMAGES)

    def traced_anew():
        def states(params):
            return module.apply({"params": params}, IMAGES, read=READ).states

        gradient = jax.grad(lambda params: states(params)[-1].sum())
        return jax.jit(lambda params: (states(params), gradient(params)))(params)

    expected = traced_anew()
    tiny.pretend_gpu(monkeypatch, "9.0")
    lengths = tiny.pretend_cudnn(monkeypatch)
    found = traced_anew()
    assert lengths == 4 * [7 if positions == "absolute" else 8]
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
        assert ours.shape == plain.shape
        assert np.linalg.norm(ours - plain) <= 0.05 * np.linalg.norm(plain)


def test_unknown_positions_name_the_key():
    with pytest.raises(UserError, match="config.model.positions"):
        ViT(**TINY, positions="relativ").init(jax.random.key(0), IMAGES)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="config.model.heads"):
        ViT(patch_size=4, width=24, depth=1, heads=5).init(jax.random.key(0), IMAGES)


def test_parts_exist_only_where_asked_for():
    mask = jnp.zeros((4, 6), bool)
    names = set(flatten_dict(shapes(ViT(**TINY), IMAGES, mask), sep="/"))
    assert "mask_token" in names and "block_0/gamma_1" in names
    names = set(flatten_dict(shapes(ViT(**TINY, layer_scale=0.0), IMAGES), sep="/"))
    assert "mask_token" not in names and not any("gamma" in name for name in names)


@pytest.mark.parametrize("kind", ["mim", "finetune"])
def test_initial_weights(kind):
    init = {"initial": FINETUNE_INIT} if kind == "finetune" else {}
    module = ViT(patch_size=4, width=96, depth=2, heads=3, positions="absolute", **init)
    params = jax.jit(module.init)(FAST_KEY, IMAGES)["params"]
    spread = 0.02 if kind == "finetune" else 0.0108
    for i in range(2):
        block = params[f"block_{i}"]
        plain = [block["attn"]["qkv"]["kernel"], block["mlp"]["fc1"]["kernel"]]
        output = [block["attn"]["proj"]["kernel"], block["mlp"]["fc2"]["kernel"]]
        np.testing.assert_allclose([x.std() for x in plain], spread, rtol=0.05)
        np.testing.assert_allclose(
            [x.std() for x in output], spread / np.sqrt(2 * (i + 1)), rtol=0.05
        )
        assert all((block[name] == np.float32(0.1)).all() for name in ("gamma_1", "gamma_2"))
        for zero in ("q_bias", "v_bias"):
            assert not block["attn"][zero].any()
    for name in ("cls_token", "pos_embed"):
        np.testing.assert_allclose(params[name].std(), spread, rtol=0.25)
    embed = params["patch_embed"]
    assert embed["bias"].any() == (kind == "finetune")
    patch = 1 / np.sqrt(3 * 80) if kind == "finetune" else spread
    np.testing.assert_allclose(embed["kernel"].std(), patch, rtol=0.05)


def test_pixels_of_masked_patches_change_nothing():
    module = ViT(**TINY)
    mask = np.zeros((4, 6), bool)
    mask[:, [1, 4]] = True
    params = random_params(module, IMAGES, mask)

    def total(images):
        states = module.apply({"params": params}, images, mask).states
        return sum(jnp.sum(jnp.sin(state)) for state in states)

    gradient = jax.jit(jax.grad(total))(IMAGES).reshape(4, 2, 4, 3, 4, 5)
    reached = np.abs(gradient).max(axis=(2, 4, 5)).reshape(4, 6)
    assert (reached[mask] == 0).all() and (reached[~mask] > 0).all()


@pytest.mark.parametrize("remat", [False, True])
def test_tokens_that_are_read_have_the_states_and_gradients_of_all(remat):
    module = ViT(**TINY, remat=remat, drop_path=0.5)
    params = random_params(module, IMAGES)
    keys = jax.random.split(jax.random.key(5), 4)

    def total(params, read):
        states = module.apply({"params": params}, IMAGES, None, keys, read).states
        last = states[-1] if read is not None else at_tokens(states[-1], READ)
        return jnp.sum(jnp.sin(last)), states

    (_, found), ours = jax.jit(jax.value_and_grad(total, has_aux=True))(params, READ)
    (_, expected), derived = jax.jit(jax.value_and_grad(total, has_aux=True))(params, None)
    assert [state.shape[1] for state in found] == [7] * (module.depth - 1) + [2]
    expected = (*expected[:-1], np.take_along_axis(np.asarray(expected[-1]), READ[:, :, None], 1))
    chex.assert_trees_all_close((found, ours), (expected, derived), atol=1e-5)


def test_only_rows_with_their_own_keys_are_dropped_and_the_first_block_never():
    module = ViT(**TINY, drop_path=0.5)
    params = random_params(module, IMAGES)
    keys = jax.random.split(jax.random.key(5), 4)
    kept, dropped = apply(module, params, IMAGES), apply(module, params, IMAGES, None, keys)
    np.testing.assert_allclose(dropped[0], kept[0], atol=1e-5)
    assert np.abs(dropped[1] - kept[1]).max() > 1e-3
    alone = apply(module, params, IMAGES[2:3], None, keys[2:3])
    np.testing.assert_allclose(alone[-1], dropped[-1][2:3], atol=1e-5)


def test_stochastic_depth_rises_linearly_to_its_rate():
    module = ViT(patch_size=2, width=6, depth=3, heads=1, drop_path=0.6)
    images = np.ones((4000, 2, 2, 1), np.float32)
    params = random_params(module, images)
    keys = jax.random.split(jax.random.key(5), 4000)
    states = np.stack(apply(module, params, images, None, keys))
    # A block whose two branches are both dropped leaves its row as it was.
    unchanged = [(states[i] == states[i - 1]).all(axis=(1, 2)).mean() for i in (1, 2)]
    np.testing.assert_allclose(unchanged, [0.3**2, 0.6**2], atol=0.03)


def test_remat_changes_no_number():
    keys = jax.random.split(jax.random.key(5), 4)

    def gradients(remat):
        module = ViT(**TINY, drop_path=0.5, remat=remat)
        params = random_params(module, IMAGES)
        gradient = jax.grad(
            lambda p: jnp.sum(module.apply({"params": p}, IMAGES, None, keys).states[-1] ** 2)
        )
        return jax.jit(gradient)(params), str(jax.make_jaxpr(gradient)(params))

    (plain, text), (remat, remat_text) = gradients(False), gradients(True)
    products = [found.count("dot_general[") for found in (text, remat_text)]
    assert products[1] > products[0]  # those of the forward pass are made again
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)


def test_bfloat16_computes_close_to_float32_with_float32_parameters():
    half = ViT(**TINY, positions="absolute+relative", dtype=jnp.bfloat16)
    full = ViT(**TINY, positions="absolute+relative")
    params = random_params(half, IMAGES)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    low, high = (apply(module, params, IMAGES)[-1] for module in (half, full))
    assert low.dtype == jnp.bfloat16 and high.dtype == jnp.float32
    error = np.abs(low.astype(jnp.float32) - high).max() / np.abs(high).max()
    assert 0 < error < 0.03
