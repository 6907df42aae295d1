"""The linear probe task: heads that share one pass through a frozen encoder and nothing else."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from beit_jax import features, losses, metrics, tasks
from beit_jax.errors import UserError
from beit_jax.task import Weights

RATES, RATE = (0.5, 5.0), 1e-2
STEPS = 10


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder of two blocks that nobody trained, as an imported run."""
    return tiny.random_network(tmp_path_factory.mktemp("mim"), tiny.config("mim"), 16)


def recipe(encoder, **changes):
    settings = {
        "init__path": str(encoder),
        "probe__learning_rates": RATES,
        "optimizer__learning_rate": RATE,
        "optimizer__final_learning_rate": RATE,
        "optimizer__weight_decay": 0.1,
        "train__steps": STEPS,
        "train__checkpoint_every": 5,
        "train__log_every": STEPS,
        "eval__batch_size": 192,
        "data__eval_split": "test",
    }
    return tiny.config("probe", **settings | changes)


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory):
    run = tiny.run(recipe(encoder), tmp_path_factory.mktemp("probe"), jax.devices()[:1])
    run.execute("train")
    return run


def trained(run):
    return jax.device_get(run.initial_state(tiny.keeper(run.folder), "eval")[0].params)


def last(run):
    return next(line for line in reversed(metrics.read(run.folder)) if line["split"] == "test")


def test_a_head_is_what_it_would_have_become_alone(finished):
    """By plain AdamW at its own rate, from the same features; bias undecayed."""
    chosen = (("cls", 0, 0), ("mean", 1, 1), ("both", 1, 0))

    def take(params):
        return {
            (pooling, *place): {
                name: leaf[place] for name, leaf in params["heads"][pooling].items()
            }
            for pooling, *place in chosen
            for place in [tuple(place)]
        }

    chains = {
        head: optax.adamw(
            RATE * RATES[head[2]], weight_decay=0.1, mask={"kernel": True, "bias": False}
        )
        for head in chosen
    }
    extract = features.make_extractor(finished.config)

    def loss(head, x, labels):
        return losses.cross_entropy(x @ head["kernel"] + head["bias"][None], labels).mean()

    @jax.jit
    def update(heads, states, batch):
        found = extract(finished.task.frozen["encoder"], batch["image"])
        found["both"] = jnp.concatenate([found["cls"], found["mean"]], axis=-1)
        for name, head in heads.items():
            grads = jax.grad(loss)(head, found[name[0]][:, name[1]], batch["label"])
            updates, states[name] = chains[name].update(grads, states[name], head)
            heads[name] = optax.apply_updates(head, updates)
        return heads, states

    heads = take(jax.jit(finished.task.init)(jax.random.key(0))[0])
    states = {name: chains[name].init(head) for name, head in heads.items()}
    batches = finished.train_batches(0)
    for _ in range(STEPS):
        heads, states = update(heads, states, next(batches))
    jax.tree.map(
        lambda ours, alone: np.testing.assert_allclose(ours, alone, atol=1e-4),
        take(trained(finished)),
        heads,
    )


def test_every_head_is_reported_and_the_choice_is_the_selection_splits(finished):
    weights = Weights(trained(finished), {}, finished.task.frozen)
    predict, right = jax.jit(finished.task.predict), {}
    for split in ("validation", "test"):
        hits = []
        for batch in finished.split_batches(split):
            guesses = np.asarray(predict(weights, batch)).argmax(-1)
            known = np.asarray(batch["label"]) >= 0
            hits.append((guesses == np.asarray(batch["label"])[:, None, None, None])[known])
        right[split] = np.concatenate(hits).mean(0)
    line = last(finished)
    heads = {name: value for name, value in line.items() if name.startswith("heads/")}
    assert len(heads) == 3 * 2 * len(RATES)
    assert heads["heads/mean_1_0.05"] == pytest.approx(right["test"][1, 1, 1], abs=1e-6)
    assert heads["heads/cls_0_0.005"] == pytest.approx(right["test"][0, 0, 0], abs=1e-6)
    best = np.unravel_index(right["validation"].argmax(), right["validation"].shape)
    assert line["probe"] == pytest.approx(right["test"][best], abs=1e-6)
    assert line["probe"] < right["test"].max()  # which a choice on the test split would report
    pooling = ("cls", "mean", "both")[best[0]]
    assert (line["probe_from_cls"], line["probe_from_mean"]) == (
        pooling != "mean",
        pooling != "cls",
    )
    assert line["probe_block"] == best[1]
    assert line["probe_learning_rate"] == pytest.approx(RATE * RATES[best[2]])


def test_eight_devices_learn_like_one(finished, encoder, tmp_path):
    run = tiny.run(recipe(encoder, train__accumulate=2), tmp_path)
    state, batches = tiny.fresh_state(run), run.train_batches(0)
    with jax.default_matmul_precision("highest"):
        for _ in range(STEPS):
            state, _ = run.train_step(state, run.task.frozen, next(batches))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), trained(finished), state.params
    )


def test_a_killed_run_goes_on_without_the_encoders_run(finished, encoder, tmp_path):
    copy = shutil.copytree(encoder, tmp_path / "encoder")
    one = jax.devices()[:1]
    tiny.killed_after(tiny.run(recipe(copy), tmp_path / "run", one), 7)
    shutil.rmtree(copy)
    again = tiny.run(recipe(copy), tmp_path / "run", one)
    again.execute("train")
    jax.tree.map(np.testing.assert_array_equal, trained(again), trained(finished))
    expected, found = last(finished), last(again)
    assert found == expected


def test_any_tower_can_be_probed_and_have_neighbours(tmp_path):
    """A teacher of another depth and normalisation than the probe's own config says."""
    tree = tiny.config("mim", model__depth=3, model__norm_pre=True, model__std=(0.3,))
    tree.task = "teacher"
    teacher = tiny.random_network(tmp_path / "teacher", tree, 8)
    tree = recipe(teacher, eval__knn=(3,), train__steps=0, train__epochs=0.0)
    run = tiny.run(tree, tmp_path / "run", jax.devices()[:1])
    run.execute("train")
    line = last(run)
    assert line["knn"] > 0.2 and 0 <= line["knn_block"] < 3
    assert "heads/both_2_0.05" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init__path": ""}, "config.init.path is empty: a probe needs an encoder"),
        ({"data__image_size": (16, 16)}, "data.image_size=.8,8., but here it is .16, 16."),
        ({"data__channels": 3, "model__mean": (0.5,)}, "give '--config.data.channels=1'"),
        ({"eval__probe": True}, "config.eval.probe=True has no place"),
        ({"probe__learning_rates": ()}, "config.probe.learning_rates=.* one or more numbers"),
    ],
)
def test_what_cannot_be_probed_is_refused(encoder, changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        tiny.run(recipe(encoder, **changes), tmp_path / "run")


def test_unlabelled_data_and_a_tokenizer_are_refused(encoder, tmp_path):
    with pytest.raises(UserError, match="has no labels, and task probe needs two"):
        tasks.build(recipe(encoder), tiny.Images(9), tmp_path)
    dvae = tiny.random_network(tmp_path / "dvae", tiny.config("dvae"), 16)
    with pytest.raises(UserError, match="config.init.path: .* is of task 'dvae' and holds no enc"):
        tasks.build(recipe(dvae), tiny.Images(9, ("a", "b")), tmp_path)
