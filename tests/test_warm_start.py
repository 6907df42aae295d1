"""What a run takes from another run's weights, at its own image size, and what it refuses."""

import jax
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict

from beit_jax import architecture, checkpoint, resize, train
from beit_jax.errors import UserError
from beit_jax.run import store_config
from beit_jax.warm_start import warm_start

pytestmark = pytest.mark.smoke

TABLE = "relative_position_bias/table"
SHARED_TABLE = f"encoder/{TABLE}"
OWN_TABLES = [f"encoder/block_{i}/attn/{TABLE}" for i in range(2)]


def shapes(config, classes=5, vocabulary=16):
    """The parameters of the config's task, as shapes."""
    images = architecture.images_of(config)
    if config.task == "mim":
        model = architecture.make_masked_image_model(config, vocabulary)
        indices = jax.ShapeDtypeStruct((1, 2), np.int32)
        return architecture.variables_of(model, images, indices)["params"]
    return architecture.variables_of(architecture.make_classifier(config, classes), images)[
        "params"
    ]


def trained(config, **sizes) -> checkpoint.Weights:
    """Weights that no other run could have, nor any fresh model."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes(config, **sizes)
    )
    return checkpoint.Weights(params, {}, config.to_dict(), "runs/first", "")


def start(source, target, source_sizes=(), **sizes):
    """Flat taken arrays, flat arrays of the source, and the report's lines without indent."""
    weights = trained(source, **dict(source_sizes))
    taken, report = warm_start(shapes(target, **sizes), weights, target)
    lines = [line.strip() for line in report.split("\n")]
    return flatten_dict(taken, sep="/"), flatten_dict(weights.params, sep="/"), lines


def config(task="classify", positions="relative", size=(8, 8), **changes):
    changes = {"data__image_size": size, "model__layer_scale": 0.1} | changes
    return tiny.config(task, model__positions=positions, **changes)


def test_pretraining_to_finetuning_on_another_grid():
    """The shared table goes to every block and to the new grid, all else as it is."""
    taken, found, report = start(config("mim", "shared_relative"), config(size=(16, 12)))
    expected = resize.relative_position_table(found[SHARED_TABLE], (4, 4), (8, 6))
    assert expected.shape != found[SHARED_TABLE].shape
    for name in OWN_TABLES:
        np.testing.assert_array_equal(taken.pop(name), expected)
    assert taken.keys() == {name for name in found if name.startswith("encoder/")} - {
        SHARED_TABLE,
        "encoder/mask_token",
    }
    for name, array in taken.items():
        np.testing.assert_array_equal(array, found[name])
    assert report[0] == f"{len(taken) + 2} encoder arrays taken from runs/first"
    assert set(report[1:]) == {
        f"copied: {SHARED_TABLE} to each of 2 blocks",
        f"resized from 4x4 to 8x6 patches: {SHARED_TABLE}",
        "fresh: fc_norm, as it has none",
        "fresh: head, as it has none",
        "not used, as this model has no such part: encoder/mask_token, lm_head, norm",
    }


def test_an_equal_grid_takes_tables_as_they_are():
    taken, found, report = start(config("mim", "shared_relative"), config())
    for name in OWN_TABLES:
        assert taken[name] is found[SHARED_TABLE]
    assert not [line for line in report if line.startswith("resized")]


@pytest.mark.parametrize(("size", "grid"), [((16, 16), (8, 8)), ((4, 16), (2, 8))])
def test_absolute_positions_are_resized(size, grid):
    """Also from 4x4 to 2x8, which has as many patches."""
    absolute = config("mim", "absolute"), config("classify", "absolute", size)
    taken, found, report = start(*absolute)
    expected = resize.position_embedding(found["encoder/pos_embed"], (4, 4), grid)
    np.testing.assert_array_equal(taken["encoder/pos_embed"], expected)
    assert not np.array_equal(expected[0, :5], found["encoder/pos_embed"][0, :5])
    assert f"resized from 4x4 to {grid[0]}x{grid[1]} patches: encoder/pos_embed" in report


def test_a_grid_with_as_many_offsets_is_resized_too():
    taken, found, _ = start(config(size=(4, 8)), config(size=(8, 4)))
    for name in OWN_TABLES:
        expected = resize.relative_position_table(found[name], (2, 4), (4, 2))
        np.testing.assert_array_equal(taken[name], expected)
        assert not np.array_equal(expected, found[name])


def test_positions_that_the_new_encoder_lacks_are_not_used():
    source = config("mim", "absolute+shared_relative")
    taken, _, report = start(source, config(size=(16, 16)))
    assert "encoder/pos_embed" not in taken
    assert report[-1] == f"resized from 4x4 to 8x8 patches: {SHARED_TABLE}"
    assert any("no such part" in line and "encoder/pos_embed" in line for line in report)
    taken, _, report = start(config("classify", "absolute+relative"), config(positions="absolute"))
    assert not set(taken) & set(OWN_TABLES)
    (line,) = [line for line in report if "no such part" in line]
    assert line.endswith(f": encoder/block_*/attn/{TABLE}")


def test_a_classifier_hands_on_its_norm_and_a_head_for_as_many_classes():
    rest = {"fc_norm/scale", "fc_norm/bias", "head/kernel", "head/bias"}
    taken, found, report = start(config(), config(size=(16, 16)))
    assert {name for name in taken if not name.startswith("encoder/")} == rest
    for name in rest:
        np.testing.assert_array_equal(taken[name], found[name])
    assert "taken too: fc_norm, head" in report
    taken, _, report = start(config(), config(), {"classes": 7}, classes=5)
    assert not [name for name in taken if name.startswith("head")]
    assert {"fc_norm/scale", "fc_norm/bias"} <= taken.keys()
    assert {
        "taken too: fc_norm",
        "fresh: head, as its head/bias is (7,), here (5,)",
    } <= set(report)


def test_a_classifier_by_cls_goes_on_with_the_norm_of_pretraining():
    source, target = config("mim", "shared_relative"), config(model__pooling="cls")
    taken, found, report = start(source, target)
    assert taken["norm/scale"] is found["norm/scale"]
    assert "taken too: norm" in report and "fresh: head, as it has none" in report


def test_pretraining_goes_on_from_either_task():
    source = config("mim", "shared_relative", model__early_layers=1)
    taken, found, report = start(source, config("mim", "shared_relative", (16, 16)))
    assert {"encoder/mask_token", "norm/scale", "lm_head/kernel"} <= taken.keys()
    assert "not used, as this model has no such part: cls_block_*" in report
    taken, _, report = start(source, source, vocabulary=8)
    assert taken.keys() == found.keys() - {"lm_head/kernel", "lm_head/bias"}
    taken, _, report = start(config(positions="relative"), config("mim", "relative"))
    assert "fresh: encoder/mask_token, as it has none" in report
    assert set(OWN_TABLES) <= taken.keys() and "encoder/mask_token" not in taken


@pytest.mark.parametrize(
    ("changes", "there", "here"),
    [
        ({"model__width": 64}, "model.width=64", "model.width=32"),
        ({"model__depth": 3}, "model.depth=3", "model.depth=2"),
        ({"model__depth": 1}, "model.depth=1", "model.depth=2"),
        ({"model__heads": 4}, "model.heads=4", "model.heads=2"),
        ({"model__patch_size": 4}, "model.patch_size=4", "model.patch_size=2"),
        ({"data__channels": 3}, "data.channels=3", "data.channels=1"),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_by_its_keys(changes, there, here):
    """Absolute positions, so that no shape tells the number of heads."""
    source, target = config("mim", "absolute"), config(positions="absolute")
    source.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with pytest.raises(UserError) as refused:
        start(source, target)
    said = str(refused.value)
    assert f"runs/first holds an encoder of {there}, " in said and f"with {here};" in said
    assert f"set --config.{there} or" in said and said.count(". ") == 0


def test_other_pixel_statistics_are_warned_of():
    source = config("mim", "shared_relative", model__mean=(0.25,))
    _, _, report = start(source, config())
    (warning,) = (line for line in report if line.startswith("WARNING"))
    assert "mean (0.25,)" in warning and "--config.model.mean" in warning
    colours = dict(data__channels=3, model__mean=(0.5,), model__std=(0.5,))
    written_out = config(**colours | dict(model__mean=(0.5,) * 3))
    _, _, report = start(config("mim", "shared_relative", **colours), written_out)
    assert not any(line.startswith("WARNING") for line in report)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ({"positions": "absolute"}, {}, f"it has no {OWN_TABLES[0]};.*positions=absolute"),
        ({}, {"positions": "shared_relative"}, f"it has no {SHARED_TABLE};.*positions=relative"),
        ({"model__layer_scale": 0}, {}, "it has no encoder/block_0/gamma_1;.*layer_scale=0"),
        ({}, {"model__layer_scale": 0}, "it has encoder/block_.*/gamma_.*layer_scale=0.1"),
    ],
)
def test_an_encoder_of_other_parts_is_refused(source, target, said):
    with pytest.raises(UserError, match=f"config.init.path=runs/first does not fit, as {said}"):
        start(config(**source), config(**target))


def test_weights_that_are_not_what_their_config_says_are_refused():
    weights, target = trained(config(size=(4, 4))), config(size=(16, 16))
    wrong = weights._replace(config=config(size=(8, 8)).to_dict())
    with pytest.raises(UserError, match="table of shape .* is not for the 4x4 patches of its"):
        warm_start(shapes(target), wrong, target)
    with pytest.raises(UserError, match=r"its .*/table is \(12, 2\), here \(52, 2\)"):
        warm_start(shapes(config()), wrong, config())


def test_a_network_without_transformer_is_refused():
    weights = trained(config())
    tokenizer = weights._replace(params={"encoder": {"input": {}}, "decoder": {}})
    for params, source in ((weights.params, tokenizer), (tokenizer.params, weights)):
        with pytest.raises(UserError, match="runs/first holds no encoder for this task"):
            warm_start(params, source, config())


def test_a_run_starts_on_twice_the_image_size(tmp_path):
    """From a pre-training run's folder to the state before a classifier's first update."""
    source = config("mim", "shared_relative")
    params = trained(source).params
    store_config(tmp_path / "mim", source)
    saving = tiny.keeper(tmp_path / "mim")
    saving.save(train.create_state(params, {}, optax.sgd(1.0), ema=False))
    saving.close()

    target = config(size=(16, 16), init__path=str(tmp_path / "mim"))
    second = tiny.run(target, tmp_path / "classify")
    state, origin = second.initial_state(tiny.keeper(second.folder), "train")
    encoder, expected = state.params["encoder"], params["encoder"]
    table = resize.relative_position_table(
        expected["relative_position_bias"]["table"], (4, 4), (8, 8)
    )
    for i in range(2):
        found = encoder[f"block_{i}"]["attn"]["relative_position_bias"]["table"]
        np.testing.assert_array_equal(found, table)
    for part in ("kernel", "bias"):
        np.testing.assert_array_equal(encoder["patch_embed"][part], expected["patch_embed"][part])
    np.testing.assert_array_equal(state.params["fc_norm"]["scale"], np.ones(32))
    assert np.asarray(state.params["head"]["kernel"]).all()
    assert f"encoder arrays taken from {tmp_path}/mim/checkpoints/0\n" in origin
    assert f"resized from 4x4 to 8x8 patches: {SHARED_TABLE}" in origin
