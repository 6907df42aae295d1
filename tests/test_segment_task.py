"""Segmentation's task: its loss, its one confusion matrix, devices, learning, and refusals.

UPerNet takes long to compile, so functions around it are tested with smaller networks.
"""

from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from beit_jax import (
    architecture,
    checkpoint,
    class_names,
    convert,
    metrics,
    photometric,
    predict,
    sharding,
    tasks,
    warm_start,
)
from beit_jax.data import pipeline
from beit_jax.data.sources import open_source
from beit_jax.errors import UserError
from beit_jax.models.upernet import BatchNorm, Segmented, resize
from beit_jax.run import store_config
from beit_jax.task import Weights, row_keys
from beit_jax.tasks import segment

CLASSES = 3


def scenes(root, sizes, split="train", channels=1, seed=0):
    """A folder of noise with label maps of three classes, some pixels unlabelled."""
    random = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        for kind, pixels in (
            ("images", random.integers(0, 256, (*size, channels), np.uint8).squeeze()),
            ("annotations", random.choice(np.array([0, 1, 2, 255], np.uint8), size)),
        ):
            path = root / kind / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (root / "classes.txt").write_text("a\nb\nc")
    return f"folder:{root}"


class Small(nn.Module):
    """A network with one BatchNorm, in the place of UPerNet."""

    classes: int = CLASSES

    @nn.compact
    def __call__(self, images, keys=None, train=False):
        x = BatchNorm(train)(nn.Conv(8, (3, 3), use_bias=False)(images))[:, ::2, ::2]
        names = ("decode_classes", "auxiliary_classes")
        logits, auxiliary = (nn.Conv(self.classes, (1, 1), name=name)(x) for name in names)
        return Segmented((), logits, auxiliary[:, ::2, ::2])


def small_task(tree, tmp_path):
    """The task of a config with a small network, and that network's variables."""
    source = open_source(tree.data.source, "train")
    task = tasks.build(tree, source, tmp_path)
    parts = segment.Segmentation(Small(), task.views, tree)
    params, state = parts.init(jax.random.key(0, impl="rbg"))
    random = np.random.default_rng(0)
    return (
        parts,
        jax.tree.map(lambda x: random.normal(0, 1, x.shape).astype(x.dtype), params),
        state,
    )


# The loss


class Known:
    """A network that says what it is told."""

    classes = CLASSES

    def __init__(self, logits, auxiliary):
        self.said = Segmented((), logits, auxiliary)

    def apply(self, variables, images, *args, train=False, mutable=()):
        return self.said, {"moments": {}}


def test_the_loss_is_that_of_the_labelled_pixels_at_full_size():
    random = np.random.default_rng(0)
    logits = random.standard_normal((2, 8, 8, CLASSES)).astype(np.float32)
    auxiliary = random.standard_normal((2, 2, 2, CLASSES)).astype(np.float32)
    mask = random.choice(np.array([0, 1, 2, 255], np.uint8), (2, 8, 8))
    config = tiny.config("segment", segment__auxiliary_weight=0.4)
    task = segment.Segmentation(Known(logits, auxiliary), None, config)
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8), "mask": mask}
    keys = row_keys(0, 0, jnp.arange(2))
    (loss, weight), (_, sums) = jax.jit(lambda b: task.loss_fn({}, {}, {}, b, keys, 0))(batch)

    def cross_entropy(logits):
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -sum(
            logs[b, y, x, mask[b, y, x]]
            for b, y, x in np.ndindex(mask.shape)
            if mask[b, y, x] < 255
        )

    # Two cells on eight pixels: the outer pixels repeat, between them eighths from 1 to 7.
    share = np.clip((np.arange(8) - 1.5) / 4, 0, 1)
    line = np.stack([1 - share, share], axis=1)
    large = np.einsum("yi,xj,bijc->byxc", line, line, auxiliary)
    assert float(weight) == (mask < 255).sum() < mask.size
    np.testing.assert_allclose(sums["decode_loss"][0], cross_entropy(logits), rtol=1e-5)
    np.testing.assert_allclose(sums["auxiliary_loss"][0], cross_entropy(large), rtol=1e-5)
    expected = cross_entropy(logits) + 0.4 * cross_entropy(large)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    right = ((logits.argmax(-1) == mask) & (mask < 255)).sum()
    assert float(sums["aAcc"][0]) == right


# The scores


def by_hand(label, found, classes=CLASSES):
    """mmsegmentation's scores, from all labelled pixels at once."""
    known = label != 255
    label, found = label[known], found[known]
    unions = [(c, ((label == c) | (found == c)).sum()) for c in range(classes)]
    ious = [((label == c) & (found == c)).sum() / union for c, union in unions if union]
    accuracies = [(found[label == c] == c).mean() for c in range(classes) if (label == c).any()]
    return {
        "mIoU": np.mean(ious),
        "mAcc": np.mean(accuracies),
        "aAcc": (label == found).mean(),
    }


@pytest.mark.parametrize("classes", [3, 2, 1])
def test_scores_are_averaged_over_the_classes_that_occur(classes):
    random = np.random.default_rng(classes)
    label, found = random.integers(0, classes, (2, 500))
    counts = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(counts, (label, found), 1)
    scores = segment.finalize({"confusion": (counts, counts.sum())})
    assert scores == pytest.approx(by_hand(label, found), abs=1e-12)


def test_each_class_has_its_own_score_as_far_as_it_has_a_name():
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    scores = segment.finalize({"confusion": (counts, counts.sum())}, ("sky", "sea", "sand"))
    shown = {name: value for name, value in scores.items() if "/" in name}
    assert list(shown) == ["IoU/sky", "IoU/sea", "IoU/sand"]
    assert list(shown.values()) == pytest.approx([3 / 4, 4 / 5, np.nan], nan_ok=True)
    assert scores["mIoU"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert "IoU/sea" not in segment.finalize({"confusion": (counts, counts.sum())})


def test_counts_beyond_32_bits_are_exact():
    counts = np.array([[3 * 2**40 + 1, 1], [0, 2**40]], np.int64)
    scores = segment.finalize({"confusion": (counts, counts.sum())})
    assert scores["aAcc"] == 1 - 1 / counts.sum()  # which no float32 could tell from 1


SIZES = [(9, 13), (8, 8), (21, 8), (11, 30), (16, 16), (33, 35), (8, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    scenes(root, [(12, 9), (8, 20)] * 4)
    return scenes(root, SIZES, "validation", seed=1)


def on_devices(folder, tmp_path, count: int, batch_size: int):
    """The confusion matrix and loss of the split, and labels and predictions of every pixel."""
    tree = tiny.config("segment", data__source=folder, segment__stride=5)
    parts, params, state = small_task(tree, tmp_path)
    mesh = sharding.make_mesh(1, jax.devices()[:count])
    batches = pipeline.eval_batches(
        open_source(folder, "validation"),
        parts.scenes,
        batch_size=batch_size,
        eval_crop=1.0,
        channels=1,
        workers=0,
    )
    weights = jax.device_put(Weights(params, state, {}), sharding.replicated(mesh))
    both = jax.jit(lambda w, b: (parts.eval_fn(*w, b, None), parts.predict(w, b)))
    sums, labels, found = [], [], []
    for batch in batches:
        placed = sharding.put_batch(batch, mesh)
        one, masks = jax.device_get(both(weights, placed))
        sums.append(one)
        # Without weights all classes are alike, wherever there is a label.
        nothing, labelled = both(jax.tree.map(jnp.zeros_like, weights), placed)[0]["loss"]
        np.testing.assert_allclose(nothing, np.log(CLASSES) * labelled, rtol=1e-5)
        assert labelled == (batch["mask"] != 255).sum()
        for i in np.flatnonzero(batch["valid"]):
            inside = np.s_[i, : batch["shape"][i, 0], : batch["shape"][i, 1]]
            labels.append(batch["mask"][inside].ravel())
            found.append(masks["classes"][inside].ravel())
    counts = sum(one["confusion"][0].astype(np.int64) for one in sums)
    loss = sum(one["loss"][0] for one in sums) / counts.sum()
    return counts, loss, np.concatenate(labels), np.concatenate(found)


@pytest.fixture(scope="module")
def on_one(folder, tmp_path_factory):
    return on_devices(folder, tmp_path_factory.mktemp("run"), count=1, batch_size=3)


def test_the_confusion_matrix_counts_every_labelled_pixel_once(on_one):
    counts, _, label, found = on_one
    assert len(label) == sum(height * width for height, width in SIZES)
    expected = np.zeros((CLASSES, CLASSES), np.int64)
    for true, said in zip(label, found, strict=True):
        if true != 255:
            expected[true, said] += 1
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum() < len(label) and (counts.sum(0) > 0).all()
    scores = segment.finalize({"confusion": (counts, counts.sum())})
    assert scores == pytest.approx(by_hand(label, found), abs=1e-12)


def test_scores_do_not_depend_on_devices_and_batches(folder, on_one, tmp_path):
    counts, loss, _, found = on_devices(folder, tmp_path, count=8, batch_size=8)
    np.testing.assert_array_equal(found, on_one[3])
    np.testing.assert_array_equal(counts, on_one[0])
    assert loss == pytest.approx(on_one[1], rel=1e-5)


# Training


def test_devices_and_microbatches_add_up(folder, tmp_path):
    """On 8 devices statistics are those of all rows; the running ones follow sums, like losses."""
    tree = tiny.config("segment", data__source=folder)
    parts, params, state = small_task(tree, tmp_path)
    batches = pipeline.train_batches(
        open_source(folder, "train"),
        parts.scenes,
        pipeline.Augmentation((1.0, 1.0), (1.0, 1.0), 0.5),
        batch_size=16,
        seed=0,
        channels=1,
        workers=0,
    )
    batch, keys = next(batches), row_keys(0, 0, jnp.arange(16))

    @jax.jit
    def update(params, state, batch, keys):
        def loss_sum(params):
            (loss, weight), (statistics, sums) = parts.loss_fn(params, state, {}, batch, keys, 0)
            return loss, (weight, statistics, sums)

        (_, found), grads = jax.value_and_grad(loss_sum, has_aux=True)(params)
        grads = jax.tree.map(lambda x: x / found[0], grads)
        return grads, *found, parts.update_state(state, found[1])

    found = []
    for count in (1, 8):
        mesh = sharding.make_mesh(1, jax.devices()[:count])
        rest = jax.device_put((params, state), sharding.replicated(mesh))
        with jax.default_matmul_precision("highest"):
            found.append(jax.device_get(update(*rest, sharding.put_batch(batch, mesh), keys)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)
    grads, weight, _, _, after = found[0]
    assert weight == (batch["mask"] < 255).sum()
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))
    # Two microbatches: what they see of the first layer's inputs is together what the batch sees.
    halves = [update(params, state, {k: v[i::2] for k, v in batch.items()}, keys[i::2])
              for i in (0, 1)]  # fmt: skip
    statistics = jax.tree.map(lambda a, b: a + b, *(half[2] for half in halves))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        parts.update_state(state, statistics),
        after,
    )


def test_digits_are_told_apart_by_their_strokes(tmp_path):
    """A minute network learns far more than to call everything background."""
    tree = tiny.config(
        "segment",
        train__steps=120,
        train__batch_size=32,
        train__log_every=40,
        segment__pools=(1,),
        segment__auxiliary_width=0,
        optimizer__learning_rate=1e-2,
        optimizer__layer_decay=1.0,
        segment__resize=(1.0, 1.0),
        segment__dropout=0.0,
    )
    run = tiny.run(tree, tmp_path, jax.devices()[:1])
    random = np.random.default_rng(0)
    params, state = jax.eval_shape(run.task.init, jax.random.key(0))
    params = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(x.dtype), params)
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(x.shape, float(path[-1].key == "var"), x.dtype), state
    )
    run.task = run.task._replace(init=lambda key: (params, fresh))  # which costs no compilation
    run.execute("train")
    first, *_, last = [line for line in metrics.read(tmp_path) if line["split"] == "train"]
    assert last["loss"] < 0.6 * first["loss"]
    (scores,) = [line for line in metrics.read(tmp_path) if line["split"] == "validation"]
    source = open_source("digits", "validation")
    ink = np.mean([source.mask(i).labels > 0 for i in range(len(source))])
    guessing = (1 - ink) / 11  # mIoU of background everywhere
    assert scores["mIoU"] > 5 * guessing, scores
    assert scores["aAcc"] > 1 - ink


def test_photometric_distortion_is_opencvs_way_of_hsv():
    image = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # hue in degrees
    for factor in (0.5, 1.5):
        scaled = hsv * [1, factor, 1]
        expected = cv2.cvtColor(
            np.clip(scaled, 0, [360, 1, 1]).astype(np.float32), cv2.COLOR_HSV2RGB
        )
        np.testing.assert_allclose(photometric.saturate(image, factor), expected, atol=1e-5)
    for share in (-0.1, 0.07):
        turned = hsv + np.array([360 * share, 0, 0], np.float32)
        turned[..., 0] %= 360
        expected = cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)
        np.testing.assert_allclose(photometric.turn_hue(image, share), expected, atol=1e-5)


def test_photometric_distortion_varies_by_row_within_bounds():
    image = jnp.full((400, 1, 1, 1), 0.5)
    keys = row_keys(0, 0, jnp.arange(400))
    found = np.asarray(jax.jit(photometric.distort)(keys, image)).ravel()
    assert found.min() >= 0.5 * (0.5 - 32 / 255) - 1e-6 and found.max() <= 0.94
    assert 0.15 < (found == 0.5).mean() < 0.35  # neither brightness nor contrast
    np.testing.assert_array_equal(
        found[7:9], jax.jit(photometric.distort)(keys[7:9], image[:2]).ravel()
    )


# From and with other runs


def test_an_imported_segmentation_is_evaluated_on_a_folder(tmp_path):
    golden, run = Path(__file__).parent / "golden" / "hf_beit_segmentation", tmp_path / "run"
    assert convert.main(["import", str(golden), str(run)]) == 0
    random = np.random.default_rng(0)
    image, label = (random.integers(0, most, (3, 64, 64), np.uint8) for most in (256, 7))
    for i in range(3):
        for kind, pixels in (("images", np.stack([image[i]] * 3, -1)), ("annotations", label[i])):
            for split in ("train", "val"):
                path = tmp_path / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    tree = ConfigDict(checkpoint.read_config(run))
    assert (tree.segment.classes, tree.segment.stride) == (7, 42)
    tree.data.source, tree.data.workers, tree.eval.batch_size = f"folder:{tmp_path}", 0, 2
    tiny.run(tree, run, jax.devices()[:1]).execute("eval")
    (scores,) = (line for line in metrics.read(run) if line["split"] == "validation")
    variables = checkpoint.load_weights(str(run), "a test").variables
    network = architecture.make_segmenter(tree, 7)
    shown = np.repeat(image[..., None] / np.float32(127.5) - 1, 3, axis=-1)
    logits = jax.jit(network.apply)(variables, shown).logits
    found = np.asarray(resize(logits, label.shape).argmax(-1))
    expected = by_hand(label.ravel(), found.ravel(), classes=7)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=2e-3)


def test_segmentation_starts_from_pre_training_at_another_size(tmp_path):
    """A shared table of positions goes to each block, at the new grid."""
    mim = tiny.config("mim", model__positions="shared_relative", model__layer_scale=0.1)
    folder = tiny.random_network(tmp_path / "mim", mim, 16)
    tree = tiny.config("segment", model__positions="relative", model__layer_scale=0.1)
    tree.data.image_size = (12, 12)
    parts, _, _ = small_task(tree, tmp_path)
    network = architecture.make_segmenter(tree, 11)
    params = architecture.variables_of(network, architecture.images_of(tree))["params"]
    weights = checkpoint.load_weights(str(folder), "config.init.path")
    taken, said = warm_start.warm_start(params, weights, tree)
    assert set(taken) == {"encoder"} and set(taken["encoder"]) == set(params["encoder"])
    table = taken["encoder"]["block_1"]["attn"]["relative_position_bias"]["table"]
    assert table.shape == (11 * 11 + 3, 2)
    assert "resized from 4x4 to 6x6 patches" in said and "fresh: pyramid" in said
    assert parts.scenes.size == (12, 12)


def test_segmentation_starts_from_segmentation_with_its_statistics(tmp_path):
    """Those of other modules than fit stay fresh, like their parameters."""
    tree = tiny.config("segment", init__path=str(tmp_path / "first"))
    tiny.random_network(tmp_path / "first", tree, 11)
    theirs = checkpoint.load_weights(str(tmp_path / "first"), "a test").variables
    tree.segment.auxiliary_width = 4
    run = tiny.run(tree, tmp_path / "second", jax.devices()[:1])
    shapes = jax.eval_shape(run.task.init, jax.random.key(0))
    fresh = jax.tree.map(lambda x: jnp.full(x.shape, 7, x.dtype), shapes)
    run.task = run.task._replace(init=lambda key: fresh)  # which costs no compilation
    state = jax.device_get(tiny.fresh_state(run))
    for found, wanted in (
        (state.params, theirs["params"]),
        (state.model_state["batch_stats"], theirs["batch_stats"]),
    ):
        for module in ("pyramid", "decode_head"):
            jax.tree.map(np.testing.assert_array_equal, found[module], wanted[module])
        assert all((leaf == 7).all() for leaf in jax.tree.leaves(found["auxiliary_conv"]))


def test_an_image_becomes_a_coloured_label_map(folder, tmp_path, monkeypatch):
    """From Python, and as files by the names of the images, of a folder without label maps."""
    monkeypatch.setattr(segment, "make_segmenter", lambda config, classes: Small(classes))
    tree = tiny.config("segment", data__source=folder, segment__stride=5, eval__batch_size=8)
    _, params, state = small_task(tree, tmp_path)
    run = tmp_path / "run"
    store_config(run, tree)
    checkpoint.save_weights(run, {"params": params, **state})
    class_names.keep(run, ("a", "b", "c"))
    segmenter, random = predict.load(str(run)), np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 1), np.uint8) for size in SIZES[:3]]
    answers = segmenter(images)
    assert [answer.size[::-1] for answer in answers] == SIZES[:3]
    assert {n for answer in answers for n in np.unique(answer)} == {0, 1, 2}
    for name, image in zip(("a.png", "b/c.png", "b/c.jpg"), images, strict=True):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    tree.data.source = f"folder:{tmp_path / 'photos'}"
    for _ in range(2):  # the second time replaces the first
        predict.write(tree, run)
        written = sorted(str(p.relative_to(run)) for p in run.glob("predictions*/**/*.png"))
        assert written == [f"predictions/{n}" for n in ("a.png", "b/c.png", "b/c.png.png")]
    for kind in ("images", "annotations"):  # a scene folder's label maps may be wrong: none is read
        path = tmp_path / "wrong" / kind / "a.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((9, 9 + len(kind)), 77, np.uint8)).save(path)
    tree.data.source = f"folder:{tmp_path / 'wrong'}"
    predict.write(tree, run)
    assert (run / "predictions" / "images" / "a.png").is_file()
    tree.data.source = f"folder:{tmp_path / 'photos'}"
    predict.write(tree, run)
    for name, answer in (("a.png", answers[0]), ("b/c.png.png", answers[1])):
        picture = Image.open(run / "predictions" / name)
        np.testing.assert_array_equal(picture, answer)
        assert picture.mode == "P" and picture.convert("RGB").getpixel((0, 0)) is not None
    colours = np.array(answers[0].getpalette()).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 200 and (colours[0] == 0).all()


# What cannot be


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("b\na\nc", "has learnt 'a' as class 0, but .* has 'b' in its place: .* correct classes"),
        ("a\nb\nc\nd", r"has learnt 3 classes \(a, b, c\), but .* has 4 classes \(a, b, c, ...\)"),
    ],
)
def test_label_maps_of_other_classes_are_refused(tmp_path, names, said):
    source = scenes(tmp_path, [(8, 8)] * 2)
    tree = tiny.config("segment", data__source=source)
    class_names.keep(tmp_path / "run", ())  # of an imported run without names
    tasks.build(tree, open_source(source, "train"), tmp_path / "run")
    (tmp_path / "run").mkdir()
    class_names.keep(tmp_path / "run", ("a", "b", "c"))
    tasks.build(tree, open_source(source, "train"), tmp_path / "run")
    (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(UserError, match=said):
        tasks.build(tree, open_source(source, "train"), tmp_path / "run")
    (tmp_path / "classes.txt").unlink()
    tree.segment.classes = 3  # label maps without names may be of the same classes
    tasks.build(tree, open_source(source, "train"), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segment.classes": 4}, "config.segment.classes=4, but .* 3 named classes"),
        ({"segment.stride": 9}, "config.segment.stride=9 leaves gaps"),
        ({"segment.scales": (1.0, 2.0)}, "config.segment.scales"),
        ({"segment.stride": 5, "segment.scales": ()}, "config.segment.scales"),
        ({"data.source": "PLAIN"}, "has no label maps; segmentation needs them"),
        ({"data.source": "UNNAMED"}, "put classes.txt .* or set config.segment.classes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(folder, changes, said, tmp_path):
    if changes.get("data.source") == "UNNAMED":
        scenes(tmp_path, [(8, 8)] * 2)
        (tmp_path / "classes.txt").unlink()
    else:
        (tmp_path / "a").mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a" / "b.png")
    tree = tiny.config("segment", data__source=folder)
    tree.update_from_flattened_dict(changes)
    if "data.source" in changes:
        tree.data.source = f"folder:{tmp_path}"
    with pytest.raises(UserError, match=said):
        source = open_source(tree.data.source, "train")
        tasks.build(tree, source, tmp_path)
