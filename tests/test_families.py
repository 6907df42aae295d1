"""What the families of foreign weights say of published and of odd shapes, without any weights."""

import pytest
from golden_files import checkpoint

from beit_jax.errors import UserError
from beit_jax.interop import dall_e
from beit_jax.interop.beit import BEIT
from beit_jax.interop.family import Hints

NONE = Hints({}, {}, {})


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "task", "outputs", "expected"),
    [
        ("beit_pretrain", "mim", 64, {"model.positions": "shared_relative", "model.heads": 3}),
        ("beit_finetune", "classify", 10, {"model.pooling": "mean", "model.layer_scale": 0.1}),
        ("beit_finetune_cls", "classify", 10, {"model.positions": "absolute+relative"}),
    ],
)
def test_official_weights_say_what_they_are(name, task, outputs, expected):
    shapes = shapes_of(checkpoint(f"{name}/checkpoint"))
    assert BEIT.fits(shapes)
    found = BEIT.describe(shapes, NONE)
    sizes = {"model.width": 48, "model.depth": 3, "data.image_size": (64, 64)}
    assert (found.task, found.outputs) == (task, outputs)
    assert sizes.items() | expected.items() <= found.config.items()
    assert "mean" in found.notes[0]  # no tensor says how pixels were normalised


def test_heads_that_no_tensor_shows_are_asked_for_and_never_guessed():
    shapes = shapes_of(checkpoint("beit_pretrain_abs/checkpoint"))
    with pytest.raises(UserError, match="--num-heads"):
        BEIT.describe(shapes, NONE)
    with pytest.raises(UserError, match="--num-heads of 5 does not divide"):
        BEIT.describe(shapes, NONE._replace(num_heads=5))
    found = BEIT.describe(shapes, NONE._replace(num_heads=3))
    assert found.config["model.heads"] == 3 and found.config["model.layer_scale"] == 0.0


def branch(depth, blocks=2):
    shapes = shapes_of(checkpoint("beit_pretrain/checkpoint"))
    block = {n.removeprefix("blocks.0."): s for n, s in shapes.items() if n.startswith("blocks.0.")}
    shapes |= {f"blocks.{i}.{n}": s for i in range(depth) for n, s in block.items()}
    return shapes | {f"cls_pt_layers.{i}.{n}": s for i in range(blocks) for n, s in block.items()}


def test_where_the_cls_branch_starts_comes_from_the_published_depth_or_a_flag():
    found = BEIT.describe(branch(12), NONE).config
    assert (found["model.early_layers"], found["model.head_layers"]) == (9, 2)
    assert found["model.mean"] == (0.485, 0.456, 0.406)
    assert BEIT.describe(branch(24), NONE).config["model.early_layers"] == 21
    with pytest.raises(UserError, match="--early-layers"):
        BEIT.describe(branch(5), NONE)
    assert BEIT.describe(branch(5), NONE._replace(early_layers=3)).config["model.early_layers"] == 3
    arguments = {"early_layers": 6, "imagenet_default_mean_and_std": False}
    found = BEIT.describe(branch(12), NONE._replace(arguments=arguments))
    assert found.config["model.early_layers"] == 6 and found.config["model.mean"] == (0.5,) * 3
    assert not found.notes


def test_a_grid_that_is_not_square_needs_to_be_stated():
    shapes = shapes_of(checkpoint("beit_pretrain/checkpoint"))
    table = "rel_pos_bias.relative_position_bias_table"
    shapes[table] = ((2 * 3 - 1) * (2 * 5 - 1) + 3, 3)
    with pytest.raises(UserError, match="no square grid"):
        BEIT.describe(shapes, NONE)
    found = BEIT.describe(shapes, NONE._replace(about={"image_size": [48, 80]}))
    assert found.config["data.image_size"] == (48, 80)


def test_weights_without_any_positions_are_refused():
    shapes = shapes_of(checkpoint("beit_pretrain/checkpoint"))
    del shapes["rel_pos_bias.relative_position_bias_table"]
    with pytest.raises(UserError, match="position"):
        BEIT.describe(shapes, NONE)


def test_what_timm_says_beside_the_weights_is_believed():
    shapes = shapes_of(checkpoint("beit_finetune/checkpoint"))
    about = {"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.9}}
    found = BEIT.describe(shapes, NONE._replace(about=about))
    assert found.config["model.mean"] == (0.1,) * 3 and found.config["data.eval_crop"] == 0.9
    assert not found.notes
    about["pretrained_cfg"]["interpolation"] = "random"
    with pytest.raises(UserError, match="interpolation=random"):
        BEIT.describe(shapes, NONE._replace(about=about))


def both():
    return {
        f"{half}.{name}": tensor
        for half in ("encoder", "decoder")
        for name, tensor in checkpoint(f"dall_e/{half}").items()
    }


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (both, ("encoder", "decoder")),
        (lambda: checkpoint("dall_e/encoder"), ("encoder",)),
        (lambda: checkpoint("dall_e/decoder"), ("decoder",)),
    ],
)
def test_dall_e_together_or_alone(tensors, parts):
    shapes = shapes_of(tensors())
    family = next(family for family in dall_e.FAMILIES if family.fits(shapes))
    found = family.describe(shapes, NONE)
    sizes = {"dvae.vocabulary": 512, "dvae.width": 64, "dvae.groups": 4, "data.channels": 3}
    assert found.parts == parts and sizes.items() <= found.config.items()
    assert found.config["dvae.blocks_per_group"] == 1
    if "decoder" in parts:
        assert found.config["dvae.decoder_input"] == 32
