"""BEiT v2's tokenizer and its codebook against the official code, and its name table."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import checkpoint, foreign_shapes, load, nhwc

from beit_jax.architecture import images_of, make_vqkd, variables_of
from beit_jax.checkpoint import Weights
from beit_jax.interop.families import FAMILIES
from beit_jax.interop.family import Hints
from beit_jax.interop.table import export_params, import_params, match_params
from beit_jax.interop.vqkd import VQKD as FAMILY
from beit_jax.interop.vqkd import official
from beit_jax.models import quantizer
from beit_jax.models.layers import FINETUNE_INIT
from beit_jax.models.vit import ViT
from beit_jax.models.vqkd import VQKD, map_pixels
from beit_jax.tokenizer import from_weights
from configs import common

TINY = dict(width=48, heads=3, positions="absolute", layer_scale=0.0, initial=FINETUNE_INIT)
MODEL = VQKD(
    ViT(patch_size=16, depth=2, **TINY),
    ViT(patch_size=1, depth=1, **TINY),
    codes=64,
    code_width=8,
    teacher_width=24,
)
TABLE = official(64, 8)
PIXELS = jnp.zeros((1, 64, 64, 3))
NEVER_READ = {f"quantize.embedding.{name}" for name in ("embed_avg", "cluster_size")}


@pytest.fixture(scope="module")
def golden():
    return load("vqkd/tensors")


@pytest.fixture(scope="module")
def variables():
    return import_params(TABLE, checkpoint("vqkd/checkpoint"), variables_of(MODEL, PIXELS))


def rows(array):
    """PyTorch's [B, E, h, w] as [B, h, w, E]."""
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def close(ours, theirs, atol=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_the_network_agrees_with_the_official_code(golden, variables):
    pixels = map_pixels(nhwc(golden["image01"]))
    close(pixels, nhwc(golden["preprocessed"]), 1e-6)
    apply = partial(MODEL.apply, method=lambda model, x: (model(x), model.tokens(x)))
    found, tokens = jax.jit(apply)(variables, pixels)
    assert tokens.dtype == jnp.int32 and tokens.shape == (2, 4, 4)
    np.testing.assert_array_equal(tokens.reshape(2, 16), golden["tokens"])
    close(found.z.reshape(2, 16, 8), golden["z"])
    np.testing.assert_array_equal(found.quantized.tokens.reshape(2, 16), golden["tokens"])
    close(found.quantized.codes, rows(golden["quantized"]))
    close(found.quantized.commitment.mean(), golden["embedding_loss"])
    close(found.features, golden["reconstruction"])
    unit = [quantizer.normalize(x) for x in (found.features, golden["teacher_target"])]
    close((1 - (unit[0] * unit[1]).sum(-1)).mean(), golden["reconstruction_loss"])


def test_grids_need_not_be_square():
    pixels = jnp.zeros((2, 32, 48, 3))
    found = jax.eval_shape(MODEL.init_with_output, jax.random.key(0), pixels)[0]
    assert found.z.shape == (2, 2, 3, 8) and found.features.shape == (2, 6, 24)
    assert found.quantized.tokens.shape == (2, 2, 3)


def test_code_projection_is_float32_in_bfloat16(golden, variables):
    vits = (vit.clone(dtype=jnp.bfloat16) for vit in (MODEL.encoder, MODEL.decoder))
    half = VQKD(*vits, MODEL.codes, MODEL.code_width, MODEL.teacher_width)
    found = jax.jit(half.apply)(variables, nhwc(golden["preprocessed"]))
    for array in (found.z, found.features):
        assert array.dtype == jnp.float32
        # More bits than bfloat16 holds: the sums were not rounded on their way out.
        assert (array != array.astype(jnp.bfloat16).astype(jnp.float32)).any()
    close(found.z.reshape(2, 16, 8), golden["z"], 0.1)


def test_a_new_codebook_lies_on_the_unit_sphere_and_is_unused():
    tiny = ViT(patch_size=1, width=4, depth=1, heads=1, initial=FINETUNE_INIT)
    model = VQKD(tiny, tiny.clone(), codes=64, code_width=8, teacher_width=2)
    key, pixels = jax.random.key(0, impl="rbg"), jnp.zeros((1, 1, 1, 3))
    codebook = jax.jit(model.init)(key, pixels)["codebook"]
    close((codebook["vectors"] ** 2).sum(-1), np.ones(64))
    # Directions all over the sphere.
    assert np.abs(codebook["vectors"].mean(0)).max() < 0.2
    assert codebook["usage"].shape == (64,) and not codebook["usage"].any()


# The codebook


def test_gradients_pass_straight_through_and_none_reaches_the_codebook(golden):
    z = rows(golden["update/z"])
    scale = jnp.arange(8.0)

    def loss_fn(z, codebook):
        found = quantizer.quantize(z, codebook)
        # The official numbers are of sum_c c * codes[c] plus the commitment.
        total = (found.codes * scale[None, None, None]).sum() + found.commitment.mean()
        return total, found

    gradient = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
    (_, found), (to_z, to_codebook) = gradient(z, jnp.asarray(golden["update/codebook_before"]))
    np.testing.assert_array_equal(found.tokens.reshape(2, 16), golden["update/tokens"])
    close(found.codes, rows(golden["update/quantized"]))
    close(found.commitment.mean(), golden["update/loss"])
    close(to_z, rows(golden["update/grad_z"]))
    assert not to_codebook.any()


def test_the_codebook_follows_its_codes_as_officially(golden):
    before = {"vectors": golden["update/codebook_before"], "usage": golden["update/usage_before"]}
    found = quantizer.quantize(rows(golden["update/z"]), before["vectors"])
    # Two halves of a batch add up to the whole of it.
    halves = [
        quantizer.statistics(found.normalized[half], found.tokens[half], 64)
        for half in (slice(1), slice(1, 2))
    ]
    after = quantizer.follow(before, jax.tree.map(jnp.add, *halves), 0.99)
    close(after["vectors"], golden["update/codebook_after"], 1e-6)
    close(after["usage"], golden["update/usage_after"], 1e-6)
    unused = golden["update/usage_after"] <= golden["update/usage_before"]
    assert unused.any() and not unused.all()
    close(after["vectors"][unused], before["vectors"][unused], 1e-6)


def test_kmeans_is_the_official_one():
    golden = load("vqkd/kmeans")
    run = jax.jit(quantizer.kmeans)
    means, counts = run(golden["samples"], golden["start"], 10)
    close(means, golden["means"])
    np.testing.assert_array_equal(counts, golden["bins"])
    once, _ = run(golden["samples"], golden["start"], 1)
    assert np.abs(once - means).max() > 0.1


def test_empty_clusters_keep_their_mean():
    starts = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    means, counts = quantizer.kmeans(jnp.array([[0.0, 2.0], [3.0, 4.0]]), starts, 3)
    close(means[1], starts[1])
    close(means[0], np.array([0.6, 1.8]) / np.hypot(0.6, 1.8))
    np.testing.assert_array_equal(counts, [2, 0])


def test_codes_are_compared_by_distance_and_zero_has_a_gradient():
    codebook = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    # The product is largest with the long code, the distance smallest to the short one.
    assert quantizer.nearest(jnp.array([[0.6, 0.8]]), codebook)[0] == 1
    gradient = jax.grad(lambda x: quantizer.normalize(x).sum())(jnp.zeros((1, 2)))
    assert np.isfinite(gradient).all()


# Names


def test_round_trip_is_exact(variables):
    tensors = checkpoint("vqkd/checkpoint")
    exported = export_params(TABLE, variables)
    assert set(exported) == set(tensors)
    for name, value in exported.items():
        if name in NEVER_READ:
            assert value.shape == tensors[name].shape and not value.any()
        else:
            np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_what_only_training_needs_is_dropped_with_a_reason(variables):
    surplus = ("teacher_model.model.visual.proj", "scaling_layer.shift", "loss_fn.weight")
    tensors = checkpoint("vqkd/checkpoint") | {name: np.zeros(3) for name in surplus}
    match = match_params(TABLE, tensors, variables)
    assert not match.missing and not match.unexpected
    assert set(surplus) < {name for names in match.dropped.values() for name in names}


def config_of(shapes, **hints):
    """The resolved config that the family's description of these shapes gives."""
    assert [known.name for known in FAMILIES if known.fits(shapes)] == [FAMILY.name]
    description = FAMILY.describe(shapes, Hints({}, {}, {}, **hints))
    assert (description.task, description.outputs) == ("vqkd", description.config["vqkd.codes"])
    config = common.get_config()
    config.update_from_flattened_dict(description.config | {"model.dtype": "float32"})
    return config.to_dict() | {"task": "vqkd"}


@pytest.mark.parametrize(
    ("decoder_depth", "teacher_width"),
    [(1, 512), (3, 512), (1, 768)],
)
def test_published_shapes_describe_their_network(decoder_depth, teacher_width):
    config = common.get_config()
    config.model.positions, config.model.layer_scale = "absolute", 0.0
    config.vqkd.decoder_depth, config.vqkd.teacher_width = decoder_depth, teacher_width
    model = make_vqkd(config)
    assert model.encoder.initial is model.decoder.initial is FINETUNE_INIT
    variables = variables_of(model, images_of(config))
    assert variables["codebook"]["vectors"].shape == (8192, 32)
    found = config_of(foreign_shapes(FAMILY.table(config), variables))
    assert found["model"]["heads"] == 12 and found["data"]["image_size"] == (224, 224)
    assert variables_of(make_vqkd(found), images_of(found)) == variables


def test_imported_weights_are_a_tokenizer_of_pixels_in_unit_range(golden):
    tensors = checkpoint("vqkd/checkpoint")
    config = config_of({name: tensor.shape for name, tensor in tensors.items()}, num_heads=3)
    target = variables_of(make_vqkd(config), images_of(config))
    state = import_params(FAMILY.table(config), tensors, target)
    frozen = from_weights(Weights(state.pop("params"), state, config, "", ""), "here", "float32")
    assert (frozen.vocabulary, frozen.factor, frozen.pictures) == (64, 16, None)
    tokens = jax.jit(frozen.tokens)(frozen.variables, nhwc(golden["image01"]))
    np.testing.assert_array_equal(tokens.reshape(2, 16), golden["tokens"])
    read = np.array([[3, 14, 6], [9, 0, 5]])
    tokens = jax.jit(frozen.tokens)(frozen.variables, nhwc(golden["image01"]), read)
    np.testing.assert_array_equal(tokens, np.take_along_axis(golden["tokens"], read, axis=1))
