"""Hugging Face's BEiT folders: reference logits, exact round trips, and their two JSON files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import GOLDEN, load, nhwc
from safetensors.numpy import save_file

from beit_jax import architecture
from beit_jax.errors import UserError
from beit_jax.interop import families, files, hugging_face, hugging_face_config
from beit_jax.interop.family import Hints
from beit_jax.interop.table import export_params, import_params, match_params
from configs import common

NONE = Hints({}, {}, {})
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def about(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def resolved(description, **changes):
    """A run's config for what a family has recognised."""
    config = common.get_config()
    config.task = description.task
    config.model.dtype = "float32"
    config.update_from_flattened_dict(description.config)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config.to_dict()


def read(name, family, make, *inputs):
    """A golden folder: network, parameters, config and tensors."""
    tensors = load(f"{name}/model")
    assert family.fits(shapes_of(tensors))
    found = family.describe(shapes_of(tensors), NONE._replace(about=about(name)))
    config = resolved(found)
    network = make(config, found.outputs)
    target = architecture.variables_of(network, architecture.images_of(config, 2), *inputs)
    target = target if found.task == "segment" else target["params"]
    params = import_params(family.table(config), tensors, target)
    return network, params, config, tensors


def mim():
    indices = jnp.zeros((2, 1), jnp.int32)
    family = hugging_face.MASKED_IMAGE_MODELING
    return read("hf_beit_mim", family, architecture.make_masked_image_model, indices)


def classifier():
    family = hugging_face.IMAGE_CLASSIFICATION
    return read("hf_beit_classification", family, architecture.make_classifier)


def segmenter():
    """All collections where the others have parameters."""
    family = hugging_face.SEMANTIC_SEGMENTATION
    return read("hf_beit_segmentation", family, architecture.make_segmenter)


READERS = {
    hugging_face.MASKED_IMAGE_MODELING: mim,
    hugging_face.IMAGE_CLASSIFICATION: classifier,
    hugging_face.SEMANTIC_SEGMENTATION: segmenter,
}
NAMES = {
    "mim": "hf_beit_mim",
    "classify": "hf_beit_classification",
    "segment": "hf_beit_segmentation",
}


def test_masked_image_modelling_agrees_with_transformers():
    network, params, _, _ = mim()
    golden = load("hf_beit_mim/tensors")
    everywhere = jnp.arange(16)
    # The rows' masks differ in length, which -1 fills up.
    masked = jnp.where(golden["mask"], everywhere, -1)
    read = jnp.broadcast_to(everywhere, masked.shape)
    (logits,) = jax.jit(network.apply)({"params": params}, nhwc(golden["image"]), masked, read=read)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)


def test_classification_agrees_with_transformers():
    network, params, _, _ = classifier()
    golden = load("hf_beit_classification/tensors")
    logits = jax.jit(network.apply)({"params": params}, nhwc(golden["image"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)


def test_segmentation_agrees_with_transformers():
    network, variables, _, _ = segmenter()
    golden = load("hf_beit_segmentation/tensors")
    found = jax.jit(network.apply)(variables, nhwc(golden["image"]))
    np.testing.assert_allclose(found.logits, golden["logits"].transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("family", READERS, ids=lambda family: family.name)
def test_round_trip_is_exact(family):
    _, params, config, tensors = READERS[family]()
    exported = export_params(family.table(config), params)
    assert set(exported) == set(tensors)
    for name, value in exported.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


@pytest.mark.parametrize("family", READERS, ids=lambda family: family.name)
def test_config_json_says_what_transformers_wrote(family):
    _, _, config, tensors = READERS[family]()
    task = config["task"]
    original = about(NAMES[task])
    outputs = {"mim": 64, "classify": 10, "segment": 7}[task]
    written = hugging_face_config.config_json(config, outputs)
    assert written.items() <= original.items()
    # What is left to transformers' defaults matters to no network of this class.
    kept = (
        "use_",
        "num_",
        "hidden_",
        "layer_",
        "architectures",
        "label",
        "id2label",
        "aux",
        "out_i",
    )
    kept += ("vocab",) if task == "mim" else ()
    heads = () if task == "segment" else ("use_auxiliary_head", "auxiliary_", "out_indices")
    left = {key for key in original if key.startswith(kept)} - set(written)
    assert not {key for key in left if not key.startswith(heads)} - {"auxiliary_loss_weight"}


def test_a_bare_model_has_its_own_names():
    tensors = load("hf_beit_classification/model")
    bare = {n.removeprefix("beit."): t for n, t in tensors.items() if n.startswith("beit.")}
    assert hugging_face.MODEL.fits(shapes_of(bare))
    others = (hugging_face.MASKED_IMAGE_MODELING, hugging_face.IMAGE_CLASSIFICATION)
    assert not any(family.fits(shapes_of(bare)) for family in others)
    assert not hugging_face.MODEL.fits(shapes_of(tensors))
    found = hugging_face.MODEL.describe(shapes_of(bare), NONE)
    assert (found.task, found.outputs, found.config["model.pooling"]) == ("encoder", 0, "mean")
    network, config = architecture.make_classifier(resolved(found), 0), resolved(found)
    target = architecture.variables_of(network, architecture.images_of(config))["params"]
    params = import_params(hugging_face.MODEL.table(config), bare, target)
    gain = tensors["beit.pooler.layernorm.weight"]
    np.testing.assert_array_equal(params["fc_norm"]["scale"], gain)
    assert hugging_face_config.config_json(config, 0)["architectures"] == ["BeitModel"]
    exported = export_params(hugging_face.MODEL.table(config), params)
    assert set(exported) == set(bare)


def test_queries_keys_and_values_lie_side_by_side():
    _, params, _, tensors = classifier()
    qkv = params["encoder"]["block_2"]["attn"]["qkv"]["kernel"]
    layer = "beit.encoder.layer.2.attention.attention"
    for number, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(
            qkv[:, 48 * number : 48 * (number + 1)], tensors[f"{layer}.{name}.weight"].T
        )


def test_a_missing_third_is_named():
    tensors = load("hf_beit_classification/model")
    del tensors["beit.encoder.layer.1.attention.attention.key.weight"]
    _, params, config, _ = classifier()
    with pytest.raises(UserError, match="encoder/block_1/attn/qkv/kernel"):
        import_params(hugging_face.IMAGE_CLASSIFICATION.table(config), tensors, params)


def test_index_buffers_and_the_mask_token_of_older_files_are_dropped():
    _, params, config, tensors = classifier()
    own = "beit.encoder.layer.{}.attention.attention.relative_position_bias.relative_position_index"
    older = {own.format(i): np.zeros((17, 17), np.int64) for i in range(4)}
    older["beit.encoder.relative_position_bias.relative_position_index"] = np.zeros((17, 17))
    older["beit.embeddings.mask_token"] = np.zeros((1, 1, 48), np.float32)
    table = hugging_face.IMAGE_CLASSIFICATION.table(config)
    match = match_params(table, tensors | older, params)
    assert not match.unexpected and not match.missing
    assert sum(map(len, match.dropped.values())) == len(older)


def test_weights_that_are_not_whole_are_refused(tmp_path):
    tensors = load("hf_beit_mim/model")
    whole = {n: t for n, t in tensors.items() if ".0.intermediate.dense." not in n}
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="looks like Hugging Face BeitForMaskedImageModeling"):
        families.recognise(files.read(str(tmp_path)))


def test_two_norms_before_the_head_are_refused():
    shapes = shapes_of(load("hf_beit_mim/model"))
    shapes["beit.layernorm.weight"] = (48,)
    with pytest.raises(UserError, match="two norms"):
        hugging_face.MASKED_IMAGE_MODELING.describe(shapes, NONE)


def test_other_transformers_are_not_beit():
    shapes = shapes_of(load("hf_beit_classification/model"))
    shapes["beit.encoder.layer.0.attention.attention.key.bias"] = (48,)
    assert not hugging_face.IMAGE_CLASSIFICATION.fits(shapes)


# What config.json and preprocessor_config.json say.


def described(**hints):
    shapes = shapes_of(load("hf_beit_mim/model"))
    return hugging_face.MASKED_IMAGE_MODELING.describe(shapes, NONE._replace(**hints))


def test_without_files_the_assumptions_are_said():
    found = described()
    assert found.outputs == 64 and "masked" in found.label.lower()
    config = found.config
    assert config["model.heads"] == 3 and config["model.norm_epsilon"] == 1e-12
    assert config["model.mean"] == (0.5,) * 3 and config["data.eval_crop"] == 1.0
    assert len(found.notes) == 2
    assert "norm_epsilon" in found.notes[0] and "mean" in found.notes[1]


def test_the_files_beside_the_weights_are_believed():
    changes = {"layer_norm_eps": 1e-6, "hidden_act": "quick_gelu", "layer_scale_init_value": 1e-5}
    processor = PROCESSOR | {"crop_size": {"height": 64, "width": 64}, "size": 80}
    found = described(about=about("hf_beit_mim") | changes, preprocessing=processor)
    assert found.config["model.norm_epsilon"] == 1e-6
    assert found.config["model.activation"] == "quick_gelu"
    assert found.config["model.layer_scale"] == 1e-5
    assert found.config["model.std"] == (0.229, 0.224, 0.225)
    assert found.config["data.interpolation"] == "bilinear"
    assert found.config["data.eval_crop"] == 0.8


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"do_normalize": False}, "model.mean", (0.0,)),
        ({"do_rescale": False, "image_mean": 127.5}, "model.mean", (0.5,)),
        ({"do_center_crop": False}, "data.eval_crop", 1.0),
        ({"resample": 1}, "data.interpolation", "lanczos"),
    ],
)
def test_a_processor_is_understood(changes, key, value):
    assert described(preprocessing=PROCESSOR | changes).config[key] == value


def test_what_only_approximates_a_processor_is_said():
    exact = PROCESSOR | {"crop_size": {"height": 64, "width": 64}}
    processor = {"about": about("hf_beit_mim"), "preprocessing": exact}
    assert not described(**processor).notes
    squeezed = exact | {"do_center_crop": False, "size": 64}
    (note,) = described(about=about("hf_beit_mim"), preprocessing=squeezed).notes
    assert "proportions" in note
    (note,) = described(about=about("hf_beit_mim"), preprocessing=PROCESSOR).notes
    assert "224x224" in note and "64x64" in note


def test_what_the_model_lacks_is_refused():
    with pytest.raises(UserError, match="hidden_act='relu'"):
        described(about={"hidden_act": "relu"})
    with pytest.raises(UserError, match="resample=5"):
        described(preprocessing=PROCESSOR | {"resample": 5})


def test_a_processor_goes_there_and_back():
    original = PROCESSOR | {"crop_size": {"height": 64, "width": 64}}
    config = resolved(described(preprocessing=original))
    written = hugging_face_config.preprocessor_json(config)
    assert original.items() <= written.items()
    one = hugging_face_config.preprocessor_json(resolved(described(), model__mean=(0.25,)))
    assert one["image_mean"] == [0.25] * 3


def test_segmentation_without_a_config_takes_the_published_taps():
    shapes = shapes_of(load("hf_beit_segmentation/model"))
    family = hugging_face.SEMANTIC_SEGMENTATION
    with pytest.raises(UserError, match="4 blocks"):
        family.describe(shapes, NONE)
    layer = {n.split(".3.", 1)[1]: s for n, s in shapes.items() if "encoder.layer.3." in n}
    deep = {f"beit.encoder.layer.{i}.{n}": s for i in range(12) for n, s in layer.items()}
    found = family.describe(shapes | deep, NONE)
    assert found.config["segment.taps"] == (2, 4, 6, 10) and "2, 4, 6, 10" in found.notes[-1]
    assert (found.task, found.outputs) == ("segment", 7)


# What Hugging Face's classes cannot hold.


def test_the_cls_branch_is_left_out_with_a_reason():
    config = resolved(described(), model__early_layers=2)
    left = hugging_face_config.inexpressible(config)
    assert set(left) == {"cls_block_0", "cls_block_1", "cls_norm", "cls_lm_head"}
    assert len(set(left.values())) == 1
    network = architecture.make_masked_image_model(config, 64)
    images = architecture.images_of(config)
    target = architecture.variables_of(network, images, jnp.zeros((1, 1), jnp.int32))["params"]
    assert {name for name in target if name.startswith("cls_")} <= set(left)
    assert not hugging_face_config.inexpressible(resolved(described()))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__qkv_bias": "none"}, "qkv_bias"),
        ({"model__norm_pre": True}, "norm_pre"),
        ({"model__patch_bias": False}, "bias"),
        ({"data__image_size": (64, 96)}, "64x96"),
        ({"task": "dvae"}, "dvae"),
        # All that its classes can read is the states before the last block's.
        ({"task": "segment", "segment__taps": (1, 2, 3, 4)}, "1, 2, 3, 4 blocks"),
        ({"task": "segment", "segment__taps": (2, 1, 2, 3)}, "2, 1, 2, 3 blocks"),
    ],
)
def test_what_would_compute_something_else_is_refused(changes, named):
    config = resolved(described(), **changes)
    for function in (hugging_face_config.inexpressible, lambda c: c and config_json(c)):
        with pytest.raises(UserError, match=named):
            function(config)


def config_json(config):
    return hugging_face_config.config_json(config, 64)
