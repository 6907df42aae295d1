"""The optimizer against numbers of the official PyTorch code."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax import optimizer
from beit_jax.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "optimizer.json").read_text())
ADAM = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, clip=0.0, layer_decay=1.0, depth=4)


def _flax_path(torch_name: str) -> tuple[str, ...]:
    """The place of an official parameter in our tree; only its last name and block matter."""
    name = re.sub(r"^blocks\.(\d+)\.", r"block_\1.", torch_name)
    name = name.replace("relative_position_bias_table", "table").replace(".proj.", ".")
    if name.endswith(".weight"):
        is_norm = re.search(r"norm\d?\.weight$", name)
        name = name.removesuffix("weight") + ("scale" if is_norm else "kernel")
    outer = () if torch_name.startswith(("head", "lm_head", "norm", "fc_norm")) else ("encoder",)
    return (*outer, *name.split("."))


def _tree(golden: dict) -> dict:
    """Shapes with the official ranks: names alone must not decide what has no axis to decay."""
    tree = {}
    for name in golden:
        *parents, last = _flax_path(name)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        is_vector = last in ("bias", "scale", "q_bias", "v_bias", "gamma_1", "gamma_2")
        shape = (4,) if is_vector else (1, 1, 4) if "token" in last else (4, 4)
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def _at(tree: dict, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    "recipe, layer_decay", [("pretrain", 1.0), ("finetune_layer_decay_0_65", 0.65)]
)
def test_decay_and_layer_scales_match_official_groups(recipe, layer_decay):
    golden = GOLDEN[recipe]
    tree = _tree(golden)
    mask = optimizer.decay_mask(tree)
    scales = optimizer.layer_scales(tree, depth=4, decay=layer_decay)
    for name, want in golden.items():
        assert _at(mask, _flax_path(name)) == (want["weight_decay"] > 0), name
        assert _at(scales, _flax_path(name)) == pytest.approx(want["lr_scale"], rel=1e-9), name


def test_biases_are_spared_whatever_their_rank():
    leaf = jax.ShapeDtypeStruct((12, 64), jnp.float32)
    mask = optimizer.decay_mask({"query": {"bias": leaf, "q_bias": leaf, "kernel": leaf}})
    assert mask == {"query": {"bias": False, "q_bias": False, "kernel": True}}


def test_shared_table_and_blocks_behind_the_encoder_move_at_full_rate():
    leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    tree = {
        "encoder": {"relative_position_bias": {"table": leaf}, "mask_token": leaf},
        "branch": {"block_4": leaf, "block_5": leaf},
    }
    scales = optimizer.layer_scales(tree, depth=4, decay=0.5)
    assert scales["encoder"]["relative_position_bias"]["table"] == 1.0
    assert scales["encoder"]["mask_token"] == 0.5**5
    assert scales["branch"] == {"block_4": 1.0, "block_5": 1.0}


@pytest.mark.parametrize("golden", GOLDEN["schedules"])
def test_schedule_matches_official_values(golden):
    per_epoch = golden["steps_per_epoch"]
    total = golden["epochs"] * per_epoch
    schedule = optimizer.warmup_cosine(
        golden["peak"], golden["final"], golden["warmup_epochs"] * per_epoch, total
    )
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(total))
    np.testing.assert_allclose(rates, golden["values"], rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(schedule(total + 3), golden["final"], rtol=1e-6)


def test_schedule_without_cosine_part_and_with_one_warmup_step():
    all_warmup = optimizer.warmup_cosine(1.0, 0.0, 5, 5)
    np.testing.assert_allclose([all_warmup(i) for i in range(5)], [0, 0.25, 0.5, 0.75, 1.0])
    assert optimizer.warmup_cosine(1.0, 0.0, 1, 2)(0) == 0.0  # linspace(0, peak, 1)
    assert optimizer.warmup_cosine(1.0, 0.0, 0, 2)(0) == 1.0


def test_linear_decay_is_mmcvs_poly_policy_with_linear_warm_up():
    """By its code: the rate that poly gives, times what warm-up leaves of it."""
    schedule = optimizer.make_schedule("linear", 7e-4, 0.0, 1500, 160_000)
    for step in (0, 1, 700, 1499, 1500, 80_000, 159_999, 160_000):
        regular = 7e-4 * (1 - step / 160_000)
        share = 1 - (1 - step / 1500) * (1 - 1e-6) if step < 1500 else 1.0
        np.testing.assert_allclose(schedule(step), regular * share, rtol=1e-5, atol=1e-9)
    assert optimizer.make_schedule("linear", 1.0, 0.5, 0, 2)(0) == 1.0
    assert optimizer.make_schedule("linear", 1.0, 0.5, 0, 2)(9) == 0.5
    with pytest.raises(UserError, match="config.optimizer.schedule='step' .* cosine, linear"):
        optimizer.make_schedule("step", 1.0, 0.0, 0, 2)


def test_three_clipped_steps_match_torch():
    golden = GOLDEN["adamw"]
    params = {"head": {"kernel": jnp.array(golden["w0"]), "bias": jnp.array(golden["b0"])}}
    chain = optimizer.make_optimizer(
        params,
        schedule=lambda _: golden["lr"],
        **ADAM | dict(zip(("b1", "b2"), golden["betas"], strict=True)),
    )
    clip = optimizer.clip_by_global_norm(golden["clip"])
    chain = optax.chain(clip, chain)
    state = chain.init(params)
    for step in golden["steps"]:
        grads = {"head": {"kernel": jnp.array(step["grad_w"]), "bias": jnp.array(step["grad_b"])}}
        np.testing.assert_allclose(optax.tree.norm(grads), step["norm"], rtol=1e-6)
        assert step["norm"] > golden["clip"]
        updates, state = chain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["head"]["kernel"], step["w"], rtol=0, atol=3e-7)
        np.testing.assert_allclose(params["head"]["bias"], step["b"], rtol=0, atol=3e-7)


def test_clipping_is_torchs_and_leaves_small_gradients_alone():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # norm 5
    clip = optimizer.clip_by_global_norm
    clipped, _ = clip(2.0).update(grads, clip(2.0).init(grads))
    np.testing.assert_allclose(clipped["b"], [4.0 * 2.0 / (5.0 + 1e-6)], rtol=1e-7)
    untouched, _ = clip(5.1).update(grads, clip(5.1).init(grads))
    np.testing.assert_array_equal(untouched["a"], grads["a"])
    # The 1e-6 counts where gradients are tiny.
    tiny = {"a": jnp.array([1e-6])}
    clipped, _ = clip(1e-6).update(tiny, clip(1e-6).init(tiny))
    np.testing.assert_allclose(clipped["a"], [0.5e-6], rtol=1e-5)


def test_layer_factor_multiplies_weight_decay_too():
    params = {"block_0": {"kernel": jnp.full((2, 2), 3.0)}, "head": {"kernel": jnp.ones((2, 2))}}
    chain = optimizer.make_optimizer(
        params, schedule=lambda _: 0.1, **ADAM | dict(layer_decay=0.5, depth=1)
    )
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = chain.update(grads, chain.init(params), params)
    np.testing.assert_allclose(updates["block_0"]["kernel"], -0.1 * 0.5 * 0.05 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * 0.05, rtol=1e-6)


def test_clip_acts_before_adam_and_zero_switches_it_off():
    params = {"kernel": jnp.zeros((2, 2))}
    big = {"kernel": jnp.full((2, 2), 50.0)}
    for clip, want in ((0.0, 50.0), (1.0, 0.5)):
        chain = optimizer.make_optimizer(params, schedule=lambda _: 1.0, **ADAM | {"clip": clip})
        _, state = chain.update(big, chain.init(params), params)
        moment = optax.tree_utils.tree_get(state, "mu")["kernel"]
        np.testing.assert_allclose(moment, 0.1 * want, rtol=1e-5)


def test_shapes_alone_build_the_state_that_arrays_build():
    params = {"encoder": {"block_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}
    shapes = jax.eval_shape(lambda: params)
    schedule = optimizer.warmup_cosine(1e-3, 0.0, 1, 10)
    chain = optimizer.make_optimizer(shapes, schedule=schedule, **ADAM | {"clip": 1.0})
    assert jax.eval_shape(chain.init, shapes) == jax.eval_shape(lambda: chain.init(params))


def test_learning_rate_scales_with_batch_only_where_a_reference_is_set():
    scaled = optimizer.scaled_learning_rate
    assert scaled(5e-5, reference_batch=128, batch_size=512) == pytest.approx(2e-4)
    assert scaled(1.5e-3, reference_batch=0, batch_size=512) == 1.5e-3


@pytest.mark.parametrize(
    "arguments, key",
    [
        ((-1.0, 0.0, 0, 5), "config.optimizer.learning_rate"),
        ((1.0, -1.0, 0, 5), "config.optimizer.final_learning_rate"),
        ((1.0, 0.0, -1, 5), "config.optimizer.warmup_steps"),
        ((1.0, 0.0, 6, 5), "config.optimizer.warmup_epochs"),
        ((1.0, 0.0, 0, 0), "config.train.steps"),
        ((float("nan"), 0.0, 0, 5), "config.optimizer.learning_rate"),
    ],
)
def test_impossible_schedules_name_the_key(arguments, key):
    with pytest.raises(UserError, match=re.escape(key)):
        optimizer.make_schedule("cosine", *arguments)


@pytest.mark.parametrize(
    "change",
    [{"b1": 1.0}, {"b2": -0.1}, {"eps": 0.0}, {"weight_decay": -1.0}, {"clip": -1.0},
     {"layer_decay": 0.0}, {"layer_decay": 1.5}],
)  # fmt: skip
def test_impossible_values_name_the_key(change):
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(UserError, match=re.escape(f"config.optimizer.{next(iter(change))} ")):
        optimizer.make_optimizer(params, schedule=lambda _: 1.0, **ADAM | change)
    with pytest.raises(UserError, match="config.optimizer.reference_batch"):
        optimizer.scaled_learning_rate(1.0, reference_batch=-1, batch_size=8)
