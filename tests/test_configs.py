"""Every recipe can be built, and impossible settings are refused by name."""

import importlib
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from beit_jax import tasks, train
from beit_jax.data import pipeline
from beit_jax.errors import UserError
from beit_jax.run import with_optimizer

CONFIGS = sorted(
    path.stem for path in Path("configs").glob("*.py") if path.stem not in ("common", "digits")
)
SOURCE = tiny.Images(1_097, tuple("0123456789"))


def load(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def presets_of(name: str) -> bool:
    return bool(inspect.signature(importlib.import_module(f"configs.{name}").get_config).parameters)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Random tokenizers, by channels and by the pixels of a token each way."""
    folders = {}
    for channels, groups in ((1, 2), (3, 2), (3, 5)):
        tree = tiny.config("dvae", data__channels=channels, dvae__groups=groups)
        tree.data.image_size = (32, 32)
        folder = tmp_path_factory.mktemp("tokenizer")
        folders[channels, 2 ** (groups - 1)] = tiny.random_network(folder, tree, 0)
    return folders


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Random teachers by the width of their features: CLIP's, DINO's and the digits' encoder."""
    folders = {}
    for task, width, outputs in (("teacher", 8, 512), ("teacher", 768, 0), ("mim", 64, 16)):
        tree = load("vqkd_base_clip") if task == "teacher" else load("digits_mim")
        tree.task, tree.model.width, tree.model.depth, tree.model.heads = task, width, 1, 1
        folder = tmp_path_factory.mktemp(f"teacher_{width}")
        folders[outputs if task == "teacher" and outputs else width] = tiny.random_network(
            folder, tree, outputs
        )
    return folders


def build(config, tokenizers, folder, teachers=None):
    decoding = config.task == "pixel_decoder"
    factor = 2 ** (config.dvae.groups - 1) if decoding else 2
    config.tokenizer.path = str(tokenizers[config.data.channels, factor])
    if config.task == "vqkd":
        config.teacher.path = str(teachers[config.vqkd.teacher_width])
    if config.task == "probe":
        config.init.path = str(teachers[64 if config.data.channels == 1 else 512])
    return tasks.build(config, SOURCE, folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_is_built_and_shaped(name, tokenizers, teachers, tmp_path):
    config = load(name)
    task = build(config, tokenizers, tmp_path, teachers)
    examples = 1_097 if config.data.source == "digits" else 1_281_167
    steps = train.total_steps(config, examples)
    task, optimizer = with_optimizer(task, config, steps, examples)
    rows = 2
    evaluated = pipeline.eval_shapes(task.views, rows, config.data.channels)
    batch = {k: v for k, v in evaluated.items() if k not in ("index", "valid")}
    if config.task == "segment":
        size = (rows, *config.data.image_size)
        batch = {
            "image": jax.ShapeDtypeStruct((*size, config.data.channels), np.uint8),
            "mask": jax.ShapeDtypeStruct(size, np.uint8),
        }

    def one_update(key, batch, evaluated):
        params, model_state = task.init(key)
        state = train.create_state(params, model_state, optimizer, ema=config.train.ema_decay > 0)
        keys = jax.random.split(key, rows)
        augmented = task.augment(batch, keys)
        grads, ((loss, weight), _) = jax.grad(
            lambda p: (lambda out: (out[0][0], out))(
                task.loss_fn(p, model_state, task.frozen, augmented, keys, 0)
            ),
            has_aux=True,
        )(params)
        optimizer.update(grads, state.opt_state, params)
        return loss / weight, task.eval_fn(params, model_state, task.frozen, evaluated, keys)

    loss, sums = jax.eval_shape(one_update, jax.random.key(0), batch, evaluated)
    assert loss.shape == ()
    assert config.eval.best in task.finalize(jax.tree.map(lambda s: np.ones(s.shape), sums))


@pytest.mark.parametrize("name", [name for name in CONFIGS if presets_of(name)])
def test_a_recipes_presets_are_named_where_another_is_asked_for(name):
    recipe = importlib.import_module(f"configs.{name}").get_config
    with pytest.raises(LookupError, match="no preset 'x'; choose one of ") as refused:
        recipe("x")
    names = str(refused.value).partition("choose one of ")[2].split(", ")
    recipes = [recipe(preset).to_json() for preset in names]
    assert len(set(recipes)) == len(names) > 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mask.share": 0.0}, "config.mask.share"),
        ({"mask.share": 1.2}, "config.mask.share"),
        ({"mask.min_block": 200}, "config.mask.min_block"),
        ({"mask.kind": "stripes"}, "config.mask.kind"),
        ({"model.positions": "sideways"}, "config.model.positions"),
        ({"data.image_size": (225, 224)}, "config.model.patch_size"),
        ({"model.heads": 7}, "config.model.heads"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, named, tokenizers, tmp_path):
    config = load("mim_base")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=named):
        task = build(config, tokenizers, tmp_path)
        jax.eval_shape(task.init, jax.random.key(0))
