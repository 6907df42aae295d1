"""CLIP's and DINO's towers against the official code, and their names in all their homes."""

import jax
import numpy as np
import pytest
from golden_files import checkpoint, foreign_shapes, load, nhwc

from beit_jax.architecture import images_of, make_tower, variables_of
from beit_jax.augment import normalize
from beit_jax.interop import clip, dino
from beit_jax.interop.families import FAMILIES
from beit_jax.interop.family import IMAGENET, Hints
from beit_jax.interop.table import export_params, import_params, match_params
from configs import common

NO_HINTS = Hints({}, {}, {})


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def tower_of(family, shapes, hints=NO_HINTS):
    """The family's description of these shapes, and the network and config that it gives."""
    assert [known.name for known in FAMILIES if known.fits(shapes)] == [family.name]
    description = family.describe(shapes, hints)
    assert description.task == "teacher"
    config = common.get_config()
    config.update_from_flattened_dict(description.config | {"model.dtype": "float32"})
    return description, make_tower(config, description.outputs), config


def imported(family, tensors, hints=NO_HINTS):
    """The network, its parameters and its description."""
    description, tower, config = tower_of(family, shapes_of(tensors), hints)
    target = variables_of(tower, images_of(config))["params"]
    return tower, import_params(family.table(config), tensors, target), description


GOLDEN = {"clip_vision": clip.CLIP, "dino": dino.DINO}


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request):
    """Name, the checkpoint, and the network that it gives with its parameters."""
    tensors = checkpoint(f"{request.param}/checkpoint")
    hints = NO_HINTS._replace(num_heads=3)
    return request.param, tensors, *imported(GOLDEN[request.param], tensors, hints)[:2]


def test_towers_agree_with_the_official_code(golden):
    name, _, tower, params = golden
    expected = load(f"{name}/tensors")
    found = jax.jit(tower.apply)({"params": params}, nhwc(expected["image"]))
    assert found.tokens.shape == (2, 17, 48)
    tokens = expected["patch_tokens" if name == "dino" else "tokens"]
    np.testing.assert_allclose(found.tokens[:, 1:], tokens, rtol=0, atol=1e-5)
    if name == "clip_vision":
        projected = found.projected[:, 1:]
        np.testing.assert_allclose(projected, expected["projected"], rtol=0, atol=1e-5)
    else:
        assert found.projected is None


def test_teachers_are_fed_as_officially():
    expected, images = load("vqkd/teacher_preprocess"), nhwc(load("vqkd/tensors")["image01"])
    for name, statistics in (("clip_input", clip.MEAN_STD), ("dino_input", IMAGENET)):
        ours = normalize(images, *statistics)
        np.testing.assert_allclose(ours, nhwc(expected[name]), rtol=0, atol=1e-5)


def test_official_round_trip_is_exact(golden):
    name, tensors, _, params = golden
    exported = export_params(GOLDEN[name].table({}), params)
    assert set(exported) == set(tensors)
    for key, value in exported.items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)


HOMES = {
    "clip_vision": (clip.CLIP, clip.CLIP_TOWER, clip.HF_CLIP),
    "dino": (
        dino.DINO_BACKBONE, dino.DINO_MODULE, dino.DINO_MODULE_BACKBONE, dino.HF_DINO
    ),
}  # fmt: skip


def test_every_home_gives_back_the_same_parameters(golden):
    name, _, _, params = golden
    for family in HOMES[name]:
        exported = export_params(family.table({}), params)
        again = imported(family, exported, NO_HINTS._replace(num_heads=3))[1]
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_hugging_face_splits_queries_keys_and_values(golden):
    name, tensors, _, params = golden
    if name == "dino":
        exported = export_params(dino.HF_DINO.table({}), params)
        whole, start = "blocks.1.attn.qkv", "encoder.layer.1.attention.attention."
        parts = "query", "key", "value"
    else:
        exported = export_params(clip.HF_CLIP.table({}), params)
        whole, start = "visual.transformer.resblocks.1.attn.in_proj", "vision_model."
        start += "encoder.layers.1.self_attn."
        parts = "q_proj", "k_proj", "v_proj"
    for i, part in enumerate(parts):
        for kind in ("weight", "bias"):
            theirs = tensors.get(f"{whole}.{kind}", tensors.get(f"{whole}_{kind}"))
            ours = exported[f"{start}{part}.{kind}"]
            np.testing.assert_array_equal(ours, theirs[48 * i : 48 * (i + 1)])


SURPLUS = {
    clip.CLIP: ("positional_embedding", "transformer.resblocks.0.ln_1.weight", "logit_scale"),
    clip.HF_CLIP: ("text_model.final_layer_norm.bias", "vision_model.embeddings.position_ids"),
    dino.DINO: ("head.mlp.0.weight", "head.last_layer.weight_g"),
    dino.DINO_MODULE_BACKBONE: ("module.head.last_layer.weight_v",),
    dino.HF_DINO: ("pooler.dense.bias",),
}


@pytest.mark.parametrize("family", SURPLUS, ids=lambda family: family.name)
def test_what_a_tower_does_not_need_is_dropped_with_a_reason(family):
    surplus = {name: np.zeros(3) for name in SURPLUS[family]}
    match = match_params(family.table({}), surplus, {})
    assert not match.unexpected and all(match.dropped)
    assert {name for names in match.dropped.values() for name in names} == set(surplus)
    assert match_params(family.table({}), {"surplus": np.zeros(3)}, {}).unexpected == ["surplus"]


def small_config(**sizes):
    config = common.get_config()
    config.model.update(positions="absolute", layer_scale=0.0, qkv_bias="qkv", **sizes)
    return config


CLIP_FIELDS = dict(activation="quick_gelu", norm_epsilon=1e-5, norm_pre=True, patch_bias=False)
PUBLISHED = [
    # The vision tower's 86,192,640 with its projection are CLIP ViT-B/16's own count.
    *((family, CLIP_FIELDS, 512, 86_192_640) for family in (clip.CLIP, clip.CLIP_TOWER)),
    (clip.HF_CLIP, CLIP_FIELDS, 512, 86_192_640),
    *((family, {}, 0, 85_798_656) for family in (dino.DINO, dino.HF_DINO)),
    (dino.DINO, dict(width=384, heads=6), 0, 21_665_664),
    (dino.DINO_BACKBONE, dict(patch_size=8), 0, 85_807_872),
]


@pytest.mark.parametrize(("family", "fields", "projection", "parameters"), PUBLISHED)
def test_published_sizes(family, fields, projection, parameters):
    config = small_config(**fields)
    tower = make_tower(config, projection)
    params = variables_of(tower, images_of(config))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    # Their foreign shapes alone describe the same network again.
    shapes = foreign_shapes(family.table(config), params)
    description, again, found = tower_of(family, shapes)
    assert description.outputs == projection
    assert found.model.heads == config.model.heads and found.data.image_size == (224, 224)
    assert found.model.mean == (clip.MEAN_STD if projection else IMAGENET)[0]
    assert description.notes and "mean" in description.notes[0]
    for field, value in fields.items():
        assert found.model[field] == value
    assert variables_of(again, images_of(found))["params"] == params


def test_a_config_beside_the_weights_is_believed():
    config = small_config(width=128, heads=4, **CLIP_FIELDS)
    params = variables_of(make_tower(config, 64), images_of(config))["params"]
    shapes = foreign_shapes(clip.HF_CLIP.table(config), params)
    vision = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-4}
    about = {"vision_config": vision, "text_config": {"num_attention_heads": 8}}
    preprocessing = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    hints = Hints(about, preprocessing, {})
    description, tower, found = tower_of(clip.HF_CLIP, shapes, hints)
    assert (tower.encoder.heads, tower.encoder.activation) == (4, "gelu")
    assert tower.encoder.norm_epsilon == 1e-4 and not description.notes
    assert found.model.mean == (0.1, 0.2, 0.3) and found.model.std == (0.4, 0.5, 0.6)


def test_grids_that_are_not_square_are_stated_beside_the_weights():
    config = small_config()
    params = variables_of(make_tower(config, 0), images_of(config))["params"]
    shapes = foreign_shapes(dino.HF_DINO.table(config), params)  # of 196 patches
    for size, expected in (([112, 448], (112, 448)), ([128, 128], (224, 224))):
        found = tower_of(dino.HF_DINO, shapes, Hints({"image_size": size}, {}, {}))[2]
        assert found.data.image_size == expected


def test_other_transformers_are_not_taken_for_dino():
    config = small_config()
    params = variables_of(make_tower(config, 0), images_of(config))["params"]
    shapes = foreign_shapes(dino.DINO.table(config), params)
    assert dino.DINO.fits(shapes)
    for other in ("head.weight", "blocks.0.ls1.gamma"):
        assert not dino.DINO.fits(shapes | {other: (1000, 768)})
