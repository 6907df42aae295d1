"""k-NN and linear probe of frozen features: what they say, and that a schedule can afford them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from beit_jax import feature_scores, features, metrics, sharding
from beit_jax.errors import UserError
from beit_jax.task import Weights

KS = (1, 10)
DIGITS = tuple("0123456789")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished pre-training with three evaluations, and the functions compiled at each."""
    tree = tiny.config(
        "mim",
        mim__target="pixels",
        model__depth=1,
        train__steps=6,
        train__eval_every=2,
        optimizer__learning_rate=1e-2,
        eval__knn=KS,
        eval__probe=True,
        eval__batch_size=192,
        data__eval_split="test",
    )
    which = tiny.run(tree, tmp_path_factory.mktemp("mim"), jax.devices()[:1])
    score, compiled = which.task.evaluators["features"], []

    def counting(weights, batches):
        before = len(names)
        values = score(weights, batches)
        compiled.append(names[before:])
        return values

    names = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    which.task = which.task._replace(evaluators={"features": counting})
    which.execute("train")
    jax.monitoring.unregister_event_duration_listener(listen)
    return which, compiled


def test_the_curve_is_in_metrics_jsonl(run):
    lines = [line for line in metrics.read(run[0].folder) if line["split"] == "test"]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert 0.1 < line["knn"] < 1 and 0.1 < line["probe"] < 1
        assert line["knn_k"] in KS and line["knn_block"] == 0 and line["probe_from_cls"] < 2
    assert len({line["knn"] for line in lines}) > 1  # of the weights of that moment


def test_later_evaluations_compile_nothing(run):
    first, *later = run[1]
    assert any("_count" in name for name in first)
    assert later == [[], []]


def described(run, params, split):
    """[(pooling, block)], features and labels of a split, as NumPy arrays."""
    extract = jax.jit(features.make_extractor(run.config))
    rows, labels = [], []
    for batch in run.split_batches(split):
        found = extract(params, batch["image"])
        valid = np.asarray(batch["valid"])
        rows.append({p: np.asarray(x)[valid] for p, x in found.items()})
        labels.append(np.asarray(batch["label"])[valid])
    whole = {p: np.concatenate([row[p] for row in rows]).astype(float) for p in ("cls", "mean")}
    kinds = {(p, block): whole[p][:, block] for p in whole for block in range(1)}
    return kinds, np.concatenate(labels)


def test_scores_are_scikit_learns(run):
    """Of the last weights: chosen on the validation split, scored on the test split."""
    run = run[0]
    state = run.initial_state(tiny.keeper(run.folder), "eval")[0]
    params = state.params["encoder"]
    (train, labels), select, test = (
        described(run, params, split) for split in ("train", "validation", "test")
    )

    def choose(classifiers):
        """The first that is best on the validation split, and its score on the test split."""
        fitted = {key: make.fit(train[key[:2]], labels) for key, make in classifiers}
        right = {key: c.score(select[0][key[:2]], select[1]) for key, c in fitted.items()}
        best = max(right, key=right.get)
        return best, fitted[best].score(test[0][best[:2]], test[1])

    line = next(x for x in reversed(metrics.read(run.folder)) if x["split"] == "test")
    (pooling, block, k), knn = choose(
        (
            (*key, k),
            KNeighborsClassifier(
                k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
            ),
        )
        for key in train
        for k in KS
    )
    found = [line[name] for name in ("knn_from_cls", "knn_block", "knn_k", "knn")]
    assert found == [pooling == "cls", block, k, pytest.approx(knn, abs=1e-6)]
    (pooling, block), probe = choose(
        (key, make_pipeline(StandardScaler(), LogisticRegression(tol=1e-6, max_iter=5_000)))
        for key in train
    )
    found = [line[name] for name in ("probe_from_cls", "probe_block", "probe")]
    assert found == [pooling == "cls", block, pytest.approx(probe, abs=1 / 350 + 1e-6)]


def test_eight_devices_score_like_one(run):
    folder = run[0].folder
    eight = tiny.run(run[0].config, folder)
    params = jax.device_get(eight.initial_state(tiny.keeper(folder), "eval")[0].params)
    scores, _ = eight.task.evaluators["features"](Weights(params, {}, {}), eight.split_batches)
    line = [line for line in metrics.read(folder) if line["split"] == "test"][-1]
    assert scores == {name: line[name] for name in scores}
    assert scores["pixel_knn"] > 0.9 and scores["pixel_probe"] > 0.9
    assert 0.1 < scores["knn"] < 0.9


def fake_data(monkeypatch, worth):
    """Batches whose features separate two classes only where `worth(split, pooling)` says so."""
    marks = {"train": 2, "validation": 3, "test": 4}

    def batches(split):
        labels = np.random.default_rng(marks[split]).integers(0, 2, 64).astype(np.int32)
        image = np.uint8(labels + 10 * marks[split])[:, None, None, None]
        batch = {"image": image, "label": labels, "valid": np.ones(64, bool)}
        yield sharding.put_batch(batch, sharding.make_mesh(1))

    def extractor(config):
        def extract(params, image):
            x = image.reshape(-1).astype(jnp.float32)
            signal, split = (x % 10)[:, None] * 2 - 1, x[0] // 10
            noise = jnp.sin(jnp.arange(64.0) * 7)[:, None]
            found = {}
            for pooling in features.POOLINGS:
                good = [mark for name, mark in marks.items() if worth(name, pooling)]
                clear = jnp.isin(split, jnp.array(good, jnp.float32))
                column = jnp.where(clear, signal, noise)
                column = jnp.concatenate([column, jnp.ones((64, 1))], axis=1)
                found[pooling] = jnp.stack([0 * column, column], axis=1)
            return found  # of two blocks, the first of which says nothing

        return extract

    monkeypatch.setattr(features, "make_extractor", extractor)
    return batches


@pytest.mark.parametrize("clear", ["cls", "mean"])
def test_a_choice_is_made_on_one_split_and_scored_on_another(monkeypatch, clear):
    """CLS tells classes apart where the choice is made, `clear` where it is scored."""
    worth = {"train": ("cls", "mean"), "validation": ("cls",), "test": (clear,)}
    batches = fake_data(monkeypatch, lambda split, pooling: pooling in worth[split])
    tree = tiny.config(
        "mim",
        model__depth=2,
        eval__knn=(3,),
        eval__probe=True,
        eval__blocks=(-1,),
        eval__pixels=False,
        data__eval_split="test",
    )
    evaluator = feature_scores.make_evaluator(tree, tiny.Images(64, ("even", "odd")))
    scores, _ = evaluator(Weights({"encoder": {}}, {}, {}), batches)
    for name in ("knn", "probe"):
        assert scores[f"{name}_from_cls"] == 1
        assert scores[f"{name}_block"] == 1  # the last of two
        assert scores[name] == 1 if clear == "cls" else scores[name] < 0.8  # its mean scores 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval__knn": (10, 2000)}, r"\(10, 2000\) asks for more neighbours than the 1097 images"),
        ({"eval__blocks": (2,)}, r"config.eval.blocks=\(2,\).* it has 2: 0 is the first and 1"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(changes, said):
    with pytest.raises(UserError, match=said):
        feature_scores.make_evaluator(tiny.config("mim", **changes), tiny.Images(1097, DIGITS))


@pytest.mark.parametrize("neighbours", [(0,), (10, -1), (2.5,)])
def test_neighbours_are_whole_numbers(neighbours, tmp_path):
    with pytest.raises(UserError, match="config.eval.knn=.* must be whole numbers above 0"):
        tiny.run(tiny.config("mim", eval__knn=neighbours), tmp_path)


def test_unlabelled_data_is_refused():
    with pytest.raises(UserError, match="need labels"):
        feature_scores.make_evaluator(tiny.config("mim", eval__knn=(1,)), tiny.Images(9, ()))


def test_features_that_the_devices_cannot_hold_are_refused(monkeypatch):
    device = jax.local_devices()[0]
    monkeypatch.setattr(type(device), "memory_stats", lambda self: {"bytes_limit": 16e9})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    tree = tiny.config("mim", model__width=768, model__depth=48, eval__knn=(1,))
    with pytest.raises(UserError, match="keep 47.3 GB .* on each device of 16.0 GB; name fewer"):
        feature_scores.make_evaluator(tree, tiny.Images(1_281_167, DIGITS))
