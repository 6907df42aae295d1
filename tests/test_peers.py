"""Against transformers itself, where it is installed: `pip install -e .[peers]`.

Both ways for each class: what we export loads without a missing or an unexpected name, what it
saves is imported, and either way the outputs agree.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from beit_jax import architecture
from beit_jax.augment import normalize
from beit_jax.data.geometry import View, center_box, resize
from beit_jax.interop import exporting, files, hugging_face_config
from beit_jax.interop.importing import import_archive
from configs import common

_REASON = "needs PyTorch and transformers: pip install -e .[peers]"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)

SIZE, PATCH = 32, 8
IMAGES = np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
MASK = np.random.default_rng(2).random((2, 16)) < 0.4
OUTPUTS = {"mim": 11, "classify": 5, "encoder": 0, "segment": 5}
TINY = {
    "model.patch_size": PATCH,
    "model.width": 24,
    "model.depth": 4,
    "model.heads": 3,
    "model.dtype": "float32",
    "data.image_size": (SIZE, SIZE),
    "segment.taps": (0, 1, 2, 3),
    "segment.auxiliary_width": 6,
}
PLAIN = {"model.positions": "absolute", "model.layer_scale": 0.0}
OWN = {"model.positions": "relative"}
CASES = {
    "mim": ("mim", {}),
    "mim, plain": ("mim", PLAIN | {"model.norm_epsilon": 1e-3}),
    "classify": ("classify", OWN | {"model.mlp_ratio": 3.0}),
    "classify, plain, cls": ("classify", PLAIN | {"model.pooling": "cls"}),
    "classify, both positions": ("classify", {"model.positions": "absolute+relative"}),
    "encoder": ("encoder", {"model.activation": "quick_gelu"}),
    "encoder, plain, cls": ("encoder", PLAIN | {"model.pooling": "cls"}),
    "segment": ("segment", OWN),
    "segment, plain, one head": ("segment", PLAIN | {"segment.auxiliary_width": 0}),
}


def config_of(task, changes):
    tree = common.get_config()
    tree.task = task
    tree.update_from_flattened_dict(TINY | changes)
    return tree.to_dict()


def random_variables(config):
    """All collections of the network of a config, no value zero, no variance near it."""
    network, inputs = architecture.make_network(config, OUTPUTS[config["task"]])
    shapes = architecture.variables_of(network, *inputs)
    random = np.random.default_rng(0)

    def draw(path, leaf):
        values = 0.2 * random.standard_normal(leaf.shape)
        return (0.5 + np.abs(values) if path[-1].key == "var" else values).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def ours(config, variables):
    """The output of our network that transformers' has too."""
    network, _ = architecture.make_network(config, OUTPUTS[config["task"]])
    if config["task"] == "mim":
        everywhere = jnp.broadcast_to(jnp.arange(16), MASK.shape)
        masked = jnp.where(MASK, everywhere, -1)
        apply = jax.jit(lambda v, x: network.apply(v, x, masked, read=everywhere)[0])
        return np.asarray(apply(variables, IMAGES))
    found = jax.jit(network.apply)(variables, IMAGES)
    if config["task"] == "segment":
        return np.asarray(found.logits.transpose(0, 3, 1, 2))
    return np.asarray(found)


def theirs(model, task):
    model.eval()
    images = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    with torch.no_grad():
        if task == "mim":
            return model(images, bool_masked_pos=torch.tensor(MASK)).logits.numpy()
        found = model(images)
    return (found.pooler_output if task == "encoder" else found.logits).numpy()


def export(config, variables, folder):
    exported = exporting.export(config, variables, "hf")
    save_file(exported.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in exported.jsons.items():
        (folder / name).write_text(json.dumps(content))
    return getattr(transformers, exported.jsons["config.json"]["architectures"][0])


# The branch of BEiT v2 stays behind.
@pytest.mark.parametrize("case", [*CASES, "mim, v2"])
def test_transformers_loads_what_we_export(case, tmp_path):
    task, changes = CASES[case] if case in CASES else ("mim", {"model.early_layers": 2})
    config = config_of(task, changes)
    variables = random_variables(config)
    kind = export(config, variables, tmp_path)
    model, loaded = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not [problem for problems in loaded.values() for problem in problems], loaded
    expected = ours(config, variables)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(theirs(model, task), expected, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_we_import_what_transformers_saves(case, tmp_path):
    task, changes = CASES[case]
    about = hugging_face_config.config_json(config_of(task, changes), OUTPUTS[task])
    kind = getattr(transformers, about.pop("architectures")[0])
    model = kind(transformers.BeitConfig(**about))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if values.is_floating_point():
                values.copy_(torch.randn_like(values) * 0.2)
                if name.endswith("running_var"):
                    values.abs_().add_(0.5)
    model.save_pretrained(tmp_path)
    imported = import_archive(files.read(str(tmp_path)), common.get_config())
    assert (imported.config.task, imported.outputs) == (task, OUTPUTS[task])
    report = dict(imported.report)
    assert (report["missing"], report["unexpected"]) == ("none", "none")
    found = ours(imported.config.to_dict(), imported.variables)
    np.testing.assert_allclose(found, theirs(model, task), atol=1e-4)


def test_transformers_prepares_images_as_evaluation_does(tmp_path):
    config = config_of("classify", {"data.eval_crop": 0.8, "model.mean": (0.1, 0.5, 0.9)})
    about = hugging_face_config.preprocessor_json(config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    processor = transformers.BeitImageProcessorPil.from_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    image = resize(noise, View((90, 131), "bicubic"))
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    view = View((SIZE, SIZE), config["data"]["interpolation"])
    box = center_box(*image.shape[:2], view.size, config["data"]["eval_crop"])
    model = config["model"]
    expected = normalize(resize(image, view, box)[None], model["mean"], model["std"])[0]
    # Pillow rounds to whole values of 255 once on either way, and they may fall to either side.
    np.testing.assert_allclose(theirs, expected, atol=2 / 255 / min(model["std"]))
