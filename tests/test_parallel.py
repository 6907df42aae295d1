"""One run, any number of devices, processes and microbatches: the same gradients and weights.

Ten updates of masked image modelling on VQ-KD's tokens with the CLS branch, at a constant rate of
1e-3 without warm-up, in float32: far enough from the start that a wrong gradient shows.
"""

import jax
import numpy as np
import pytest
import tiny

from beit_jax import checkpoint, metrics

STEPS = 10
TOLERANCE = 1e-5  # relative, in the Euclidean norm of each array


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.random_network(tmp_path_factory.mktemp("vqkd"), tiny.config("vqkd"), 0)


def recipe(tokenizer, **changes):
    return tiny.config(
        "mim",
        tokenizer__path=str(tokenizer),
        train__steps=STEPS,
        optimizer__learning_rate=1e-3,
        optimizer__final_learning_rate=1e-3,
        model__drop_path=0.2,
        model__early_layers=1,
        model__head_layers=1,
        data__color_jitter=0.4,
        **changes,
    )


def ten_updates(tokenizer, folder, devices, twin=None, **changes):
    """First-step gradients, ten losses, the parameters after them, and the last batch's tokens."""
    run = tiny.run(recipe(tokenizer, **changes), folder, devices)
    if twin is not None:
        run.task = run.task._replace(loss_fn=twin(run.task.loss_fn))
        run.train_step = tiny.rebuilt_step(run)
    state, losses, first = tiny.fresh_state(run), [], None
    batches = run.train_batches(0)
    with jax.default_matmul_precision("highest"):
        for _ in range(STEPS):
            batch = next(batches)
            state, values = run.train_step(state, run.task.frozen, batch)
            losses.append(float(values["loss"]))
            if first is None:  # Adam's first moment after one update is (1 - b1) times it
                first = jax.device_get(tiny.first_moment(state.opt_state))
        tokens = jax.jit(tokens_of(run.task))(run.task.frozen, batch)
    return first, losses, jax.device_get(state.params), np.asarray(tokens)


def tokens_of(task):
    parts = task.eval_fn.__self__
    return lambda frozen, batch: parts.target.labels(frozen, parts.views(batch))


@pytest.fixture(scope="module")
def one_device(tokenizer, tmp_path_factory):
    return ten_updates(tokenizer, tmp_path_factory.mktemp("one"), jax.devices()[:1])


def distance(expected, actual) -> float:
    """The largest relative distance between two arrays of the same name."""

    def relative(a, b):
        return np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(a), 1e-12)

    return max(jax.tree.leaves(jax.tree.map(relative, expected, actual)))


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (8, {}),
        (8, {"mesh__fsdp": 4}),
        (2, {"train__accumulate": 4}),
    ],
    ids=["data-parallel", "fsdp", "accumulation"],
)
def test_devices_and_microbatches_change_nothing(tokenizer, tmp_path, one_device, count, changes):
    *found, tokens = ten_updates(tokenizer, tmp_path, jax.devices()[:count], **changes)
    *wanted, wanted_tokens = one_device
    flipped = int((tokens != wanted_tokens).sum())
    for expected, actual in zip(wanted, found, strict=True):
        assert distance(expected, actual) < TOLERANCE, f"{flipped} of {tokens.size} tokens flipped"
    assert flipped == 0 and len(np.unique(tokens)) >= 4


def test_without_gradient_reduction_it_would_show(tokenizer, tmp_path, one_device):
    """The twin keeps the gradient of the first device's rows, as if no other's had been added."""

    def twin(loss_fn):
        def first_device_only(params, model_state, frozen, batch, keys, step):
            valid = np.arange(16) < 16 // 8
            return loss_fn(params, model_state, frozen, {**batch, "valid": valid}, keys, step)

        return first_device_only

    found = ten_updates(tokenizer, tmp_path, None, twin)
    for expected, actual in zip(one_device[:3], found[:3], strict=True):
        assert distance(expected, actual) > 100 * TOLERANCE


def test_two_processes_of_four_devices(tokenizer, tmp_path, one_device):
    tree = recipe(tokenizer, train__checkpoint_every=1, train__keep=STEPS)
    tiny.two_processes(tree, tmp_path / "run")
    gradients, losses, params, _ = one_device
    lines = [line for line in metrics.read(tmp_path / "run") if line["split"] == "train"]
    assert distance(losses, [line["loss"] for line in lines]) < TOLERANCE
    checkpoints = tmp_path / "run" / "checkpoints"
    final = checkpoint.load_weights(checkpoints / str(STEPS), "config.init.path").params
    assert distance(params, final) < TOLERANCE
    first = checkpoint.read_tree(checkpoints / "1" / "opt_state")
    assert distance(gradients, tiny.first_moment(first)) < TOLERANCE
