"""Name tables: exact round trips, and every leftover or missing name is said."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import checkpoint, random_params, shapes

from beit_jax.errors import UserError
from beit_jax.interop import dall_e
from beit_jax.interop.beit import official
from beit_jax.interop.table import Table, export_params, import_params
from beit_jax.models.beit import Classifier, MaskedImageModel
from beit_jax.models.dvae import Decoder, Encoder
from beit_jax.models.vit import ViT

TINY = dict(patch_size=16, width=48, depth=3, heads=3)
IMAGES, MASKED = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 6), jnp.int32)
BEIT = official((4, 4))
DALL_E = Table("DALL-E", dall_e.RULES)
PIXELS = jnp.zeros((1, 8, 8, 3))


def pretraining(**fields):
    return shapes(MaskedImageModel(ViT(**TINY, **fields), 64), IMAGES, MASKED)


def classifier(positions, pooling):
    return shapes(Classifier(ViT(**TINY, positions=positions), 10, pooling), IMAGES)


TOKENIZER = dict(vocabulary=512, width=64, groups=4, blocks_per_group=1)
FAMILIES = {
    "beit_pretrain/checkpoint": (BEIT, lambda: pretraining()),
    "beit_pretrain_abs/checkpoint": (
        BEIT,
        lambda: pretraining(positions="absolute", layer_scale=0.0),
    ),
    "beit_finetune/checkpoint": (BEIT, lambda: classifier("relative", "mean")),
    "beit_finetune_cls/checkpoint": (BEIT, lambda: classifier("absolute+relative", "cls")),
    "dall_e/encoder": (DALL_E, lambda: shapes(Encoder(**TOKENIZER), PIXELS)),
    "dall_e/decoder": (
        DALL_E,
        lambda: shapes(Decoder(**TOKENIZER, decoder_input=32), jnp.zeros((1, 1, 1, 512))),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_exact(name):
    table, target = FAMILIES[name]
    tensors = checkpoint(name)
    exported = export_params(table, import_params(table, tensors, target()))
    assert set(exported) == set(tensors)  # the index buffers too, worked out again
    for key, value in exported.items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)


def test_imported_weights_take_the_dtype_of_the_model():
    table, target = FAMILIES["dall_e/encoder"]
    tensors = {n: t.astype(np.float16) for n, t in checkpoint("dall_e/encoder").items()}
    params = import_params(table, tensors, target())
    assert params["input"]["kernel"].dtype == np.float32


def test_both_families_of_names_lie_in_their_places():
    params = import_params(BEIT, checkpoint("beit_pretrain/checkpoint"), pretraining())
    tensors = checkpoint("beit_pretrain/checkpoint")
    np.testing.assert_array_equal(
        params["encoder"]["block_2"]["mlp"]["fc1"]["kernel"], tensors["blocks.2.mlp.fc1.weight"].T
    )
    np.testing.assert_array_equal(
        params["encoder"]["patch_embed"]["kernel"][3, 5, 1],
        tensors["patch_embed.proj.weight"][:, 1, 3, 5],
    )


def test_exported_arrays_lie_in_memory_as_they_read():
    model = MaskedImageModel(ViT(**TINY), 64)
    tensors = export_params(BEIT, random_params(model, IMAGES, MASKED))
    # safetensors writes the memory as it lies.
    assert all(value.flags["C_CONTIGUOUS"] for value in tensors.values())


def test_weights_without_a_place_are_named():
    tensors = checkpoint("beit_pretrain/checkpoint")
    with pytest.raises(UserError, match="surplus.weight"):
        import_params(BEIT, tensors | {"surplus.weight": np.zeros(3)}, pretraining())
    # A known name is no less left over where the model does not have the part.
    with pytest.raises(UserError, match="rel_pos_bias.relative_position_bias_table"):
        import_params(BEIT, tensors, pretraining(positions="absolute"))
    with pytest.raises(UserError, match="blocks.2.attn.q_bias.* and 7 more"):
        shallow = MaskedImageModel(ViT(**TINY | {"depth": 2}), 64)
        import_params(BEIT, tensors, shapes(shallow, IMAGES, MASKED))


def test_missing_weights_are_named():
    tensors = checkpoint("beit_pretrain/checkpoint")
    del tensors["blocks.1.attn.q_bias"]
    with pytest.raises(UserError, match="encoder/block_1/attn/q_bias"):
        import_params(BEIT, tensors, pretraining())


def test_other_sizes_are_named():
    tensors = checkpoint("beit_pretrain/checkpoint")
    with pytest.raises(UserError, match="lm_head.*64.*100"):
        target = shapes(MaskedImageModel(ViT(**TINY), 100), IMAGES, MASKED)
        import_params(BEIT, tensors, target)


def test_parameters_of_another_family_are_not_exported():
    with pytest.raises(UserError, match="group_1_block_1/conv_1/kernel"):
        export_params(BEIT, {"group_1_block_1": {"conv_1": {"kernel": np.zeros(3)}}})


def test_index_buffers_follow_a_grid_that_is_not_square():
    images = jnp.zeros((1, 32, 80, 3))
    model = MaskedImageModel(ViT(**TINY), 64)
    tensors = export_params(official((2, 5)), random_params(model, images, MASKED))
    index = tensors["rel_pos_bias.relative_position_index"]
    assert index.shape == (11, 11) and index.dtype == np.int64
    assert index.max() + 1 == len(tensors["rel_pos_bias.relative_position_bias_table"])
