"""Attention maps are what the network attends to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from beit_jax import attention
from beit_jax.architecture import make_encoder
from beit_jax.augment import normalize
from beit_jax.errors import UserError
from beit_jax.models import layers
from beit_jax.task import Weights


@pytest.mark.parametrize(
    ("positions", "qkv_bias"),
    [("absolute", "qv"), ("shared_relative", "qkv"), ("relative", "none"), ("relative", "qv")],
)
def test_maps_are_the_last_blocks_attention(positions, qkv_bias, monkeypatch):
    tree = tiny.config("mim", model__positions=positions, model__qkv_bias=qkv_bias)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    encoder = make_encoder(tree)
    pixels = normalize(images, tree.model.mean, tree.model.std)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), pixels)["params"]
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: random.normal(0, 0.5, x.shape).astype(x.dtype), shapes)

    found = jax.jit(attention.make_maps(tree))(params, jnp.asarray(images))
    attend, seen = layers.attend, []

    def watched(qkv, bias):
        q, k, _ = jnp.moveaxis(qkv, 2, 0)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        seen.append(jax.nn.softmax(logits if bias is None else logits + bias[None]))
        return attend(qkv, bias)

    monkeypatch.setattr(layers, "attend", watched)
    last = jax.jit(lambda params: (encoder.apply({"params": params}, pixels), seen[-1])[1])(params)
    assert len(seen) == tree.model.depth
    expected = np.asarray(last)[:, :, 1:, 1:].mean(2).reshape(3, 2, 4, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.std() > 1e-3  # the heads look at something


@pytest.mark.parametrize("positions", ["relative", "shared_relative"])
def test_maps_leave_out_the_padding_of_fused_attention(positions, monkeypatch):
    tree = tiny.config("mim", model__positions=positions, model__dtype="bfloat16")
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8))
    pixels = normalize(images, tree.model.mean, tree.model.std)
    params = make_encoder(tree).init(jax.random.key(0), pixels)["params"]
    plain = attention.make_maps(tree)(params, images)
    tiny.pretend_gpu(monkeypatch, "9.0")
    lengths = tiny.pretend_cudnn(monkeypatch)
    found = attention.make_maps(tree)(params, images)
    assert set(lengths) == {18}
    np.testing.assert_allclose(found, plain, atol=1e-3)


def test_a_row_of_the_picture_is_a_head():
    tree = tiny.config("mim", eval__attention=(1,))
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    encoder = make_encoder(tree)
    pixels = normalize(images, (0.5,), (0.5,))
    params = jax.jit(encoder.init)(jax.random.key(0), pixels)["params"]
    batches = {"validation": [{"image": jnp.asarray(images)}]}
    evaluator = attention.make_evaluator(tree)
    numbers, pictures = evaluator(
        Weights({"encoder": params}, {}, {}), lambda split: iter(batches[split])
    )
    assert numbers == {} and list(pictures) == ["attention"]
    picture = pictures["attention"]
    assert picture.shape == (2 * 66, 8 * 66, 3)  # the images, and one head
    heads = picture[66:130].reshape(64, 8, 66, 3)[:, :, :64]
    assert (heads.max((0, 2, 3)) == 255).all()  # each image's brightest patch


def test_a_head_that_is_not_there():
    with pytest.raises(UserError, match=r"config.eval.attention=\(0, 2\).* it has 2"):
        attention.make_evaluator(tiny.config("mim", eval__attention=(0, 2)))
