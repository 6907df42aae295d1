"""UPerNet: its parts against plain loops, its size, its training, and the official names."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import architecture
from beit_jax.errors import UserError
from beit_jax.interop import segmentation
from beit_jax.interop.beit import BEIT
from beit_jax.interop.family import Hints
from beit_jax.interop.table import export_params, import_params, match_params
from beit_jax.models import upernet
from beit_jax.models.upernet import Segmenter
from beit_jax.models.vit import ViT
from configs import common

NONE = Hints({}, {}, {})
TINY = dict(patch_size=4, width=8, depth=4, heads=2, positions="relative")
FAST_KEY = jax.random.key(0, impl="rbg")
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 24, 3)), jnp.float32)
TAPS = (1, 2, 3, 4)


def tiny(**fields):
    return Segmenter(ViT(**TINY), **dict(classes=5, taps=TAPS, auxiliary_width=6) | fields)


def random_like(tree, seed=0):
    """Values for shapes, all above zero, so that variances are variances."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: random.uniform(0.1, 0.3, x.shape).astype(x.dtype), tree)


def variables(network):
    return random_like(architecture.variables_of(network, IMAGES))


def config(depth, width, heads, image_size, **changes):
    tree = common.get_config()
    tree.task = "segment"
    tree.update_from_flattened_dict(
        {
            "model.depth": depth,
            "model.width": width,
            "model.heads": heads,
            "model.positions": "relative",
            "data.image_size": image_size,
        }
        | changes
    )
    return tree.to_dict()


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Published as 163M and 441M; those are the networks for 640 pixels, the auxiliary head included.
@pytest.mark.parametrize(
    ("shape", "parameters"),
    [((12, 768, 12), 163_407_980), ((24, 1024, 16), 441_271_084)],
    ids=["base", "large"],
)
def test_published_sizes(shape, parameters):
    taps = (4, 6, 8, 12) if shape[0] == 12 else (8, 12, 16, 24)
    tree = config(*shape, (640, 640), **{"segment.taps": taps})
    network = architecture.make_segmenter(tree, 150)
    found = architecture.variables_of(network, architecture.images_of(tree))
    assert size(found["params"]) == parameters
    # A mean and a variance for every channel of 14 BatchNorms.
    assert size(found["batch_stats"]) == 2 * (13 * shape[1] + 256)


def test_logits_have_a_quarter_of_the_images_size():
    network = tiny()
    found = jax.eval_shape(network.apply, variables(network), IMAGES)
    assert found.logits.shape == (2, 16, 24, 5)  # patches are of 4 pixels here
    assert found.auxiliary.shape == (2, 4, 6, 5)
    assert [level.shape[1:3] for level in found.levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert found.logits.dtype == found.auxiliary.dtype == jnp.float32


def test_heads_can_be_left_out():
    network = tiny(classes=0)
    assert set(variables(network)["params"]) == {"encoder", "pyramid"}
    found = jax.eval_shape(network.apply, variables(network), IMAGES)
    assert found.logits is None and found.auxiliary is None and len(found.levels) == 4
    without = tiny(auxiliary_width=0)
    assert not [name for name in variables(without)["params"] if "auxiliary" in name]


def test_levels_are_read_where_the_taps_say():
    network = Segmenter(ViT(**TINY | {"depth": 2}), classes=0, taps=(2, 0, 1, 1))
    tree = variables(network)
    levels = jax.jit(network.apply)(tree, IMAGES).levels
    encoded = jax.jit(network.encoder.apply)({"params": tree["params"]["encoder"]}, IMAGES)

    def grid(state):
        return state[:, 1:].reshape(2, 4, 6, 8)

    np.testing.assert_allclose(levels[2], grid(encoded.states[0]), rtol=1e-5)
    np.testing.assert_allclose(
        levels[3], grid(encoded.states[0]).reshape(2, 2, 2, 3, 2, 8).max((2, 4)), rtol=1e-5
    )
    up = {"params": tree["params"]["pyramid"]["up_1"]}
    expected = upernet.UpConv().apply(up, grid(encoded.embedded))
    np.testing.assert_allclose(levels[1], expected, rtol=1e-5)


@pytest.mark.parametrize("taps", [(1, 2, 3), (1, 2, 3, 5), (-1, 1, 2, 3)])
def test_impossible_taps_are_refused(taps):
    with pytest.raises(UserError, match="config.segment.taps"):
        architecture.variables_of(tiny(taps=taps), IMAGES)


# The parts, against what PyTorch documents.


@pytest.mark.parametrize(("side", "target"), [(4, 7), (7, 4), (3, 12), (6, 1), (5, 5), (1, 3)])
def test_resizing_weighs_the_two_nearest(side, target):
    x = np.random.default_rng(0).standard_normal(side).astype(np.float32)
    expected = []
    for i in range(target):
        at = max((i + 0.5) * side / target - 0.5, 0.0)
        low = int(at)
        high = min(low + 1, side - 1)
        expected.append(x[low] + (at - low) * (x[high] - x[low]))
    rows = upernet.resize(jnp.asarray(x)[None, :, None, None], (0, target, 1, 0))
    np.testing.assert_allclose(rows[0, :, 0, 0], expected, atol=1e-6)
    columns = upernet.resize(jnp.asarray(x)[None, None, :, None], (0, 1, target, 0))
    np.testing.assert_allclose(columns[0, 0, :, 0], expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "cells"), [(7, 5, 3), (2, 3, 6), (8, 8, 2), (1, 4, 1)])
def test_pooling_covers_the_map_with_boxes(height, width, cells):
    x = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    found = upernet.average_pool(jnp.asarray(x), cells)
    assert found.shape == (2, cells, cells, 3)
    for i in range(cells):
        for j in range(cells):
            top, bottom = int(np.floor(i * height / cells)), int(np.ceil((i + 1) * height / cells))
            left, right = int(np.floor(j * width / cells)), int(np.ceil((j + 1) * width / cells))
            expected = x[:, top:bottom, left:right].mean(axis=(1, 2))
            np.testing.assert_allclose(found[:, i, j], expected, atol=1e-6)


def test_transposed_convolution_stamps_its_kernel():
    random = np.random.default_rng(0)
    x, kernel = random.standard_normal((1, 2, 3, 4)), random.standard_normal((2, 2, 4, 4))
    bias = random.standard_normal(4)
    expected = np.broadcast_to(bias, (1, 4, 6, 4)).copy()
    for i in range(2):
        for j in range(3):
            stamp = np.einsum("i,klio->klo", x[0, i, j], kernel)
            expected[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += stamp
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    found = upernet.UpConv().apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Training.


def batch_norm(x, training=True):
    """PyTorch's documented BatchNorm2d by hand: output, and running statistics from (0, 1)."""
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    n = x.size // x.shape[-1]
    return (x - mean) / np.sqrt(var + 1e-5), 0.1 * mean, 0.9 + 0.1 * var * n / (n - 1)


def test_training_normalises_by_the_batch_and_moves_the_running_statistics():
    layer = upernet.ConvNorm(3, 1, train=True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 5, 2)), jnp.float32)
    tree = layer.init(FAST_KEY, x)
    y, updated = layer.apply(tree, x, mutable=["moments"])
    raw = np.asarray(x) @ np.asarray(tree["params"]["conv"]["kernel"][0, 0])
    normalised, mean, var = batch_norm(raw)
    np.testing.assert_allclose(y, np.maximum(normalised, 0), atol=1e-5)
    statistics = upernet.follow(tree["batch_stats"], updated["moments"])["norm"]
    np.testing.assert_allclose(statistics["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], var, atol=1e-6)


def test_microbatches_move_the_running_statistics_as_their_batch_does():
    layer = upernet.BatchNorm(train=True)
    x = 1e3 + np.random.default_rng(0).standard_normal((6, 3, 3, 2)).astype(np.float32)
    start = {"batch_stats": {"mean": jnp.full(2, 999.0), "var": jnp.ones(2)}}
    tree = start | {"params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}

    def moments(x):
        return layer.apply(tree, x, mutable=["moments"])[1]["moments"]

    parts = jax.tree.map(lambda *sums: sum(sums), *(moments(x[i::3]) for i in range(3)))
    for found in (moments(x), parts):
        after = upernet.follow(start["batch_stats"], found)
        np.testing.assert_allclose(after["mean"], 899.1 + 0.1 * x.mean((0, 1, 2)), rtol=1e-6)
        unbiased = x.astype(np.float64).var((0, 1, 2), ddof=1)
        np.testing.assert_allclose(after["var"], 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_dropped_channels_follow_the_rows_keys():
    keys = jax.random.split(jax.random.key(3), 4)
    x = jnp.ones((4, 2, 3, 100))
    y = upernet.drop_channels(x, keys, 0.25)
    assert set(np.unique(y)) == {0.0, np.float32(4 / 3)}
    assert (y == y[:, :1, :1]).all()  # whole channels
    np.testing.assert_array_equal(upernet.drop_channels(x[2:3], keys[2:3], 0.25), y[2:3])
    assert not (y[0] == y[1]).all()


def test_only_keys_make_training_random():
    network = Segmenter(ViT(**TINY | {"depth": 1}), 5, (1, 0, 1, 1), (1,), 6, dropout=0.5)
    tree = variables(network)
    keys = jax.random.split(jax.random.key(0), 2)
    plain, dropped = jax.jit(
        lambda: (network.apply(tree, IMAGES), network.apply(tree, IMAGES, keys))
    )()
    assert not np.allclose(dropped.logits, plain.logits)
    assert not np.allclose(dropped.auxiliary, plain.auxiliary)
    np.testing.assert_allclose(dropped.levels[3], plain.levels[3], rtol=1e-5)


def test_every_statistic_is_moved_in_training():
    network = tiny()
    tree = variables(network)

    def after(tree):
        train = partial(network.apply, train=True, mutable=["moments"])
        return upernet.follow(tree["batch_stats"], train(tree, IMAGES)[1]["moments"])

    shapes = jax.eval_shape(after, tree)
    assert jax.tree.structure(shapes) == jax.tree.structure(tree["batch_stats"])
    jaxpr = jax.make_jaxpr(after)(tree)
    kept = set(jaxpr.jaxpr.outvars) & set(jaxpr.jaxpr.invars)
    assert not kept  # none goes through as it came


# Official names: mmsegmentation 0.11 around the official backbone.

OFFICIAL = config(12, 8, 2, (16, 16), **{"model.patch_size": 4, "segment.auxiliary_width": 6})


def official(classes=5, family=segmentation.SEGMENTATION):
    network = architecture.make_segmenter(OFFICIAL, classes)
    images = architecture.images_of(OFFICIAL)
    tree = random_like(architecture.variables_of(network, images))
    return tree, export_params(family.table(OFFICIAL), tree)


def test_official_names():
    _, tensors = official()
    heads = {n: t.shape for n, t in tensors.items() if not n.startswith("backbone.")}
    expected = {}
    for name, inputs, outputs, kernel in (
        *((f"decode_head.psp_modules.{i}.1", 8, 8, 1) for i in range(4)),
        ("decode_head.bottleneck", 40, 8, 3),
        *((f"decode_head.lateral_convs.{i}", 8, 8, 1) for i in range(3)),
        *((f"decode_head.fpn_convs.{i}", 8, 8, 3) for i in range(3)),
        ("decode_head.fpn_bottleneck", 32, 8, 3),
        ("auxiliary_head.convs.0", 8, 6, 3),
    ):
        expected[f"{name}.conv.weight"] = (outputs, inputs, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.bn.{part}"] = (outputs,)
        expected[f"{name}.bn.num_batches_tracked"] = ()
    for name, width in (("decode_head", 8), ("auxiliary_head", 6)):
        expected[f"{name}.conv_seg.weight"] = (5, width, 1, 1)
        expected[f"{name}.conv_seg.bias"] = (5,)
    assert heads == expected
    backbone = {n.removeprefix("backbone.") for n in tensors if n.startswith("backbone.")}
    pyramid = {name for name in backbone if name.startswith("fpn")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convs = ("fpn1.0", "fpn1.3", "fpn2.0")
    assert pyramid == {f"{c}.{p}" for c in convs for p in norm[:2]} | {f"fpn1.1.{p}" for p in norm}
    block = "blocks.11.attn."
    assert {f"{block}relative_position_index", f"{block}qkv.weight", "cls_token"} <= backbone


@pytest.mark.parametrize(
    ("family", "classes"),
    [(segmentation.SEGMENTATION, 5), (segmentation.SEGMENTATION, 0), (segmentation.BACKBONE, 0)],
    ids=["whole", "backbone", "bare"],
)
def test_official_weights_are_understood(family, classes):
    tree, tensors = official(classes, family)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    others = {BEIT, segmentation.SEGMENTATION, segmentation.BACKBONE} - {family}
    assert family.fits(shapes) and not any(other.fits(shapes) for other in others)
    found = family.describe(shapes, NONE._replace(num_heads=2))
    assert (found.task, found.outputs) == ("segment", classes)
    assert found.config["segment.taps"] == (4, 6, 8, 12)
    assert found.config["segment.auxiliary_width"] == (6 if classes else 0)
    assert found.config["model.mean"] == (0.485, 0.456, 0.406) and "ADE20K" in found.notes[0]
    match = match_params(family.table(OFFICIAL), tensors, tree)
    assert not match.unexpected and not match.missing
    imported = import_params(family.table(OFFICIAL), tensors, tree)
    jax.tree.map(np.testing.assert_array_equal, imported, tree)


def test_where_pytorch_has_its_transposed_kernels():
    tree, tensors = official()
    kernel = tree["params"]["pyramid"]["up_0_second"]["kernel"]
    torch = tensors["backbone.fpn1.3.weight"]  # [in, out, kh, kw]
    assert torch[3, 5, 0, 1] == kernel[0, 1, 3, 5]


def test_what_no_published_segmentation_has_is_refused():
    _, tensors = official()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shallow = {name: shape for name, shape in shapes.items() if ".blocks.11." not in name}
    with pytest.raises(UserError, match="11 blocks"):
        segmentation.SEGMENTATION.describe(shallow, NONE._replace(num_heads=2))
    del shapes["decode_head.psp_modules.3.1.conv.weight"]
    with pytest.raises(UserError, match="pool_scales"):
        segmentation.SEGMENTATION.describe(shapes, NONE._replace(num_heads=2))
