"""Training VQ-KD: one update, its invariances, the codebook's start, its collapse and revival."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_files import checkpoint as golden_checkpoint
from golden_files import load, nhwc
from test_vqkd import MODEL, PIXELS, TABLE

from beit_jax import checkpoint, metrics, train
from beit_jax.architecture import make_vqkd, variables_of
from beit_jax.interop import exporting
from beit_jax.interop.table import import_params
from beit_jax.models import quantizer
from beit_jax.models.vqkd import map_pixels
from beit_jax.task import row_keys
from beit_jax.tasks import codebook, vqkd
from beit_jax.teacher import Teacher

STEPS, ONE = 6, slice(1)
HISTORY = checkpoint.HISTORY


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.random_network(tmp_path_factory.mktemp("teacher"), tiny.config("mim"), 16)


def recipe(teacher, **changes):
    """Codes die after two updates and start again: the busiest kind of update."""
    settings = dict(
        model__depth=1,
        train__steps=STEPS,
        vqkd__codes=32,
        vqkd__kmeans_vectors=20,
        vqkd__dead_after=2,
        vqkd__restart_dead=True,
        optimizer__learning_rate=1e-3,
        optimizer__final_learning_rate=1e-3,
    )
    return tiny.config("vqkd", teacher__path=str(teacher), **settings | changes)


def make_run(tree, folder, devices):
    """A run that starts from random weights which cost no compilation."""
    run = tiny.run(tree, folder, devices)
    random, init = np.random.default_rng(0), run.task.init
    shapes = jax.eval_shape(init, jax.random.key(0))[0]
    params = jax.tree.map(lambda x: random.normal(0, 0.2, x.shape).astype(x.dtype), shapes)
    run.task = run.task._replace(init=lambda key: (params, init(key)[1]))
    return run


@pytest.fixture(scope="module")
def run_on_one(teacher, tmp_path_factory):
    return make_run(recipe(teacher), tmp_path_factory.mktemp("run"), jax.devices()[ONE])


def elsewhere(run, folder, **changes):
    """The same run, compiled already, in another folder."""
    run, run.folder = copy.copy(run), folder
    vars(run).update(changes)
    return run


# One update


@pytest.mark.smoke
def test_the_loss_is_the_official_one_and_the_codebook_follows():
    golden = load("vqkd/tensors")
    variables = import_params(
        TABLE, golden_checkpoint("vqkd/checkpoint"), variables_of(MODEL, PIXELS)
    )
    target = golden["teacher_target"]
    known = Teacher(target, 24, (4, 4), 3, None, lambda variables, images: variables)
    config = tiny.config("vqkd", vqkd__codes=64, data__color_jitter=0.0, vqkd__decay=0.99)
    task = vqkd.Distillation(MODEL, known, {"image": None}, config, 7.0)
    params, book = variables["params"], variables["codebook"]
    state = {"codebook": book, HISTORY: {"age": jnp.full(64, 7, jnp.int32)}}
    batch = {"image": nhwc(golden["image01"])}

    @jax.jit
    def update(batch):
        (loss, weight), (statistics, sums) = task.loss_fn(
            params, state, target, batch, row_keys(0, 0, jnp.arange(2)), 0
        )
        return loss / weight, vqkd.finalize(sums), task.update_state(state, statistics)

    loss, values, after = update(batch)
    expected = golden["reconstruction_loss"] + golden["embedding_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(values["imitation"], golden["reconstruction_loss"], rtol=1e-5)
    np.testing.assert_allclose(values["commitment"], golden["embedding_loss"], rtol=1e-5)
    counts = np.bincount(golden["tokens"].ravel(), minlength=64)
    assert float(values["usage"]) == (counts > 0).mean()
    assert float(values["recent_usage"]) == 1.0 and float(values["dead_codes"]) == 0
    assert float(values["epoch_usage"]) == 0.0  # 7 updates of age, an epoch of 7
    np.testing.assert_array_equal(after[HISTORY]["age"], np.where(counts, 0, 8))
    chosen = quantizer.quantize(golden["z"], book["vectors"])
    statistics = quantizer.statistics(chosen.normalized, golden["tokens"], 64)
    for name, moved in quantizer.follow(book, statistics, 0.99).items():
        np.testing.assert_allclose(after["codebook"][name], moved, atol=1e-6)


# Devices, microbatches, resuming


def trained(run):
    """State, losses and last tokens of `STEPS` updates from random codes, and codes restarted."""
    run.task = run.task._replace(warm_start=None)  # which has a test of its own
    state, losses, restarts = tiny.fresh_state(run), [], 0
    batches = run.train_batches(0)
    with jax.default_matmul_precision("highest"):
        for _ in range(STEPS):
            before = np.asarray(state.model_state[HISTORY]["age"])
            batch = next(batches)
            state, values = run.train_step(state, run.task.frozen, batch)
            dying = before == run.config.vqkd.dead_after
            restarts += (np.asarray(state.model_state[HISTORY]["age"])[dying] == 0).sum()
            losses.append(float(values["loss"]))
        weights = train.Weights(state.params, state.model_state, run.task.frozen)
        tokens = jax.jit(run.task.predict)(weights, batch)
    return state, losses, np.asarray(tokens), restarts


@pytest.fixture(scope="module")
def one_device(run_on_one):
    found = trained(copy.copy(run_on_one))
    assert found[3] > 0, "no code was restarted, so restarts are not compared"
    return found


def test_gradients_reach_all_of_the_network(one_device):
    moments = jax.tree_util.tree_leaves_with_path(tiny.first_moment(one_device[0].opt_state))
    for path, leaf in moments:
        assert np.any(leaf), jax.tree_util.keystr(path)


def book_distance(first, second) -> float:
    """The largest difference of a code's vector; ages must be the same."""
    a, b = (found[0].model_state for found in (first, second))
    if not np.array_equal(a[HISTORY]["age"], b[HISTORY]["age"]):
        return np.inf
    return np.abs(np.asarray(a["codebook"]["vectors"]) - b["codebook"]["vectors"]).max()


@pytest.mark.parametrize(
    ("count", "changes"),
    [(8, {}), (4, {"mesh__fsdp": 2, "train__accumulate": 4})],
    ids=["data-parallel", "fsdp-and-accumulation"],
)
def test_devices_and_microbatches_change_no_code(teacher, tmp_path, one_device, count, changes):
    found = trained(make_run(recipe(teacher, **changes), tmp_path, jax.devices()[:count]))
    np.testing.assert_allclose(found[1], one_device[1], rtol=1e-5)
    flipped = int((found[2] != one_device[2]).sum())
    assert book_distance(one_device, found) < 1e-5, f"{flipped} of {found[2].size} tokens flipped"
    assert flipped == 0
    if not changes:  # every device holds the whole codebook, bit for bit the same
        shards = found[0].model_state["codebook"]["vectors"].addressable_shards
        assert len(shards) == 8
        for shard in shards:
            np.testing.assert_array_equal(shard.data, shards[0].data)


def test_statistics_of_one_device_alone_would_show(run_on_one, tmp_path, one_device):
    run = elsewhere(run_on_one, tmp_path)
    loss_fn = run.task.loss_fn

    def first_device_only(params, state, frozen, batch, keys, step):
        total, (_, sums) = loss_fn(params, state, frozen, batch, keys, step)
        first = {name: x[:2] for name, x in batch.items()}
        _, (statistics, _) = loss_fn(params, state, frozen, first, keys[:2], step)
        return total, (statistics, sums)

    run.task = run.task._replace(loss_fn=first_device_only)
    run.train_step = tiny.rebuilt_step(run)
    assert book_distance(one_device, trained(run)) > 1e-2


def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(run_on_one, tmp_path):
    def kmeans_again(*_):
        raise AssertionError("a resumed run has its codebook")

    tree = run_on_one.config.copy_and_resolve_references()
    tree.train.checkpoint_every = 3
    task = run_on_one.task._replace(evaluators={}, warm_start=None)
    run = elsewhere(run_on_one, tmp_path / "whole", config=tree, task=task)
    run.execute("train")
    tiny.killed_after(elsewhere(run, tmp_path / "killed"), 5)
    task = task._replace(warm_start=kmeans_again)
    elsewhere(run, tmp_path / "killed", task=task).execute("train")
    whole, killed = (
        [line for line in metrics.read(tmp_path / folder) if line["split"] != "timing"]
        for folder in ("whole", "killed")
    )
    assert killed == whole and len(whole) == STEPS + 1
    trees = [
        checkpoint.read_tree(tmp_path / folder / "checkpoints" / str(STEPS) / "model_state")
        for folder in ("whole", "killed")
    ]
    assert set(trees[0]) == {"codebook", HISTORY}
    jax.tree.map(np.testing.assert_array_equal, *trees)
    weights = checkpoint.load_weights(str(tmp_path / "whole"), "a test")
    assert set(weights.model_state) == {"codebook"}  # what the network has
    assert exporting.export(weights.config, weights.variables, "unilm").tensors


def test_imported_weights_are_evaluated_though_they_have_no_history(run_on_one, teacher, tmp_path):
    tiny.random_network(tmp_path, recipe(teacher), 0)
    elsewhere(run_on_one, tmp_path).execute("eval")
    line = metrics.read(tmp_path)[0]
    assert line["split"] == "validation" and 0 < line["usage"] <= 1
    assert line["dead_codes"] == round(32 * (1 - line["usage"]))
    assert list((tmp_path / "pictures").glob("codes_*.png"))


def test_two_processes_train_the_same_codes(teacher, tmp_path):
    """K-means over both processes' rows, and the moving average of both."""
    tree = recipe(teacher, train__steps=4)
    tiny.two_processes(tree, tmp_path / "two")
    with jax.default_matmul_precision("highest"):
        tiny.run(tree, tmp_path / "one", jax.devices()[ONE]).execute("train")
    one, two = (
        [line["loss"] for line in metrics.read(tmp_path / name) if line["split"] == "train"]
        for name in ("one", "two")
    )
    np.testing.assert_allclose(two, one, rtol=1e-5)
    one, two = (
        checkpoint.read_tree(tmp_path / name / "checkpoints" / "4" / "model_state")
        for name in ("one", "two")
    )
    np.testing.assert_array_equal(two[HISTORY]["age"], one[HISTORY]["age"])
    np.testing.assert_allclose(two["codebook"]["vectors"], one["codebook"]["vectors"], atol=1e-5)


# The codebook's start


def started(run):
    with jax.default_matmul_precision("highest"):
        state, origin = run.initial_state(tiny.keeper(run.folder), "train")
    return np.asarray(state.model_state["codebook"]["vectors"]), origin


def test_kmeans_starts_alike_on_any_number_of_devices(run_on_one, teacher, tmp_path):
    one, origin = started(elsewhere(run_on_one, tmp_path / "one"))
    eight, again = started(make_run(recipe(teacher), tmp_path / "eight", jax.devices()))
    np.testing.assert_allclose(one, eight, atol=1e-5)
    # 20 vectors for each of 32 codes; 16 of an image, 16 images a batch.
    assert "10 iterations over 768 vectors of 3 batches of 16 images" in origin
    assert again == origin
    np.testing.assert_allclose((one**2).sum(-1), 1, atol=1e-5)


def test_starts_are_drawn_without_replacement(teacher, tmp_path, monkeypatch):
    """As many codes as vectors: each vector starts one."""
    monkeypatch.setattr(quantizer, "kmeans", lambda vectors, starts, _: (starts, starts[:, 0]))
    tree = recipe(teacher, vqkd__codes=256, vqkd__kmeans_vectors=1)
    found, said = started(make_run(tree, tmp_path, jax.devices()[ONE]))
    assert "over 256 vectors of 1 batches" in said
    assert len(np.unique(found, axis=0)) == 256


def test_kmeans_is_that_of_the_encoders_vectors(run_on_one, tmp_path):
    run = elsewhere(run_on_one, tmp_path)
    params, model_state = jax.jit(run.task.init)(jax.random.key(0))
    after, _ = run.task.warm_start(params, model_state, run.task.frozen, run.train_batches(0))
    assert not np.any(after["codebook"]["usage"])
    variables = {"params": params, **model_state}
    encode = jax.jit(lambda x: make_vqkd(run.config).apply(variables, x, method="encode"))
    batches = run.train_batches(0)
    z = np.concatenate([encode(map_pixels(next(batches)["image"] / 255)) for _ in range(3)])
    vectors = np.asarray(quantizer.normalize(z.reshape(-1, 8)))
    codes = np.asarray(after["codebook"]["vectors"])
    nearest = (vectors @ codes.T).argmax(1)
    for code in np.unique(nearest):  # converged, or nearly: each code is the mean of its own
        mean = vectors[nearest == code].sum(0)
        assert mean @ codes[code] > 0.98 * np.linalg.norm(mean)


# Collapse and revival


def last_lines(folder):
    lines = metrics.read(folder)
    return [[x for x in lines if x["split"] == s][-1] for s in ("train", "validation")]


def test_collapse_raises_an_alarm_and_the_remedy_revives(run_on_one, teacher, tmp_path, capsys):
    """A bad start: random codes, nearly all of them far from every vector."""
    bad = make_run(
        recipe(teacher, vqkd__restart_dead=False, vqkd__kmeans=0, train__steps=40),
        tmp_path / "bad",
        jax.devices()[ONE],
    )
    bad.task = bad.task._replace(evaluators={})
    bad.execute("train")
    shown = " ".join(capsys.readouterr().out.split())
    alarms = [int(step) for step in re.findall(r"ALARM at update (\d+): only", shown)]
    assert alarms == [4, 40]  # once in training, once by the evaluation
    assert "give this command again with --config.vqkd.restart_dead=True" in shown
    update, evaluation = last_lines(tmp_path / "bad")
    assert update["recent_usage"] < 0.4 and evaluation["usage"] < 0.5
    assert update["dead_codes"] == round(32 * (1 - update["recent_usage"]))

    task = run_on_one.task._replace(warm_start=None, evaluators={})
    elsewhere(run_on_one, tmp_path / "good", task=task, steps=40).execute("train")
    assert "ALARM at update 40" not in capsys.readouterr().out
    update, evaluation = last_lines(tmp_path / "good")
    assert update["recent_usage"] > 0.8 and evaluation["usage"] > 0.8


def test_dead_codes_take_the_vectors_that_are_alone_in_their_slot():
    book = jnp.eye(4)
    found = quantizer.Candidates(10 * jnp.eye(4)[::-1], jnp.array([2.0, 1.0, 0.0, 1.0]))
    dead = jnp.array([False, True, True, True])
    after, moved = quantizer.restart(book, dead, found)
    np.testing.assert_array_equal(moved, [False, True, True, False])
    expected = np.stack([book[0], 10 * np.eye(4)[2], 10 * np.eye(4)[0], book[3]])
    np.testing.assert_array_equal(after, expected)


def test_candidates_are_the_rows_own_vectors_wherever_the_rows_lie():
    vectors = np.random.default_rng(0).normal(size=(16, 5, 3)).astype(np.float32)
    keys = row_keys(0, 0, jnp.arange(16))
    whole = jax.tree.map(np.asarray, quantizer.candidates(vectors, keys, 16))
    assert whole.rows.sum() == 16 and 3 <= (whole.rows == 1).sum() < 16
    for slot in np.flatnonzero(whole.rows == 1):
        assert (vectors == whole.vectors[slot]).all(-1).any()
    parts = [quantizer.candidates(vectors[i::4], keys[i::4], 16) for i in range(4)]
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    np.testing.assert_array_equal(summed.rows, whole.rows)
    alone = whole.rows == 1
    np.testing.assert_array_equal(summed.vectors[alone], whole.vectors[alone])


def test_a_small_split_is_no_collapse(run_on_one):
    few = {"usage": 0.3, "vectors_per_code": 0.4}  # by chance it would hardly be more
    assert not run_on_one.task.alarms(few)
    assert run_on_one.task.alarms(few | {"vectors_per_code": 40.0})


def test_the_gallery_shows_a_codes_patches_and_places():
    tokens = np.array([[[5, 2], [2, 2]], [[2, 5], [2, 2]]])
    images = np.zeros((2, 4, 4, 1), np.float32)
    images[0, :2, :2] = images[1, :2, 2:] = 1.0  # code 5's patches are white
    picture = codebook.gallery(images, tokens, codes=2, count=4)
    assert picture.shape == (2 * 66, 4 * 66, 3)
    tiles = picture.reshape(2, 66, 4, 66, 3)[:, :64, :, :64, 0]
    middle = tiles[:, 31, :, 31]
    assert middle[0, 1] < 50  # the commonest code first
    assert (middle[1, 1:3] > 200).all() and middle[1, 3] == 255  # two patches, an empty tile
    heat = tiles[1, :, 0]  # code 5 is above, never below
    assert heat[8, 8] == heat[8, 56] == 255 and heat[56, 8] == 0
