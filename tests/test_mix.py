"""Mixup, cutmix and random erasing against plain versions of the same, and on any devices."""

import jax
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn

from beit_jax import augment, sharding, train
from beit_jax.architecture import make_classifier
from beit_jax.task import Purpose, Task, keys_for, mean_of_sums
from beit_jax.tasks.classify import Classification

RNG = np.random.default_rng(0)
ROWS = 4_000
SIZE = (16, 12)
JITTED = jax.jit(augment.mix, static_argnames=("mixup", "cutmix"))


def keys_of(number: int) -> jax.Array:
    return jax.random.split(jax.random.key(5), number)


def mix(images, number=None, mixup=0.8, cutmix=1.0, switch=0.5):
    keys = keys_of(number or len(images))[: len(images)]
    found = JITTED(keys, images, mixup=mixup, cutmix=cutmix, switch=switch)
    return jax.tree.map(np.asarray, found)


def own_pixels(**ways):
    """The share [ROWS, H, W] that images keep of each pixel, and of the whole [ROWS].

    Half of the images are white and their partners black, so that the mixture shows it.
    """
    images = np.zeros((2 * ROWS, *SIZE, 1), np.float32)
    images[:ROWS] = 1.0
    mixed, own = mix(images, **ways)
    np.testing.assert_allclose(mixed[ROWS:], 1 - own_of_partner(mixed, images), atol=1e-6)
    return mixed[:ROWS, ..., 0], own[:ROWS]


def own_of_partner(mixed, images):
    """What black images keep, from how white they became; a check that both halves are mixed."""
    return 1 - mixed[len(images) // 2 :]


def plain_cut(generator, height, width):
    """timm's cutmix box on one image, by its rules: what of each pixel is kept."""
    kept = generator.uniform()
    h, w = (int(side * np.sqrt(1 - kept)) for side in (height, width))
    y, x = generator.integers(height), generator.integers(width)
    rows = np.clip([y - h // 2, y + h // 2], 0, height)
    columns = np.clip([x - w // 2, x + w // 2], 0, width)
    pixels = np.ones((height, width))
    pixels[slice(*rows), slice(*columns)] = 0
    return pixels


def test_mixing_is_with_the_partner_and_the_share_is_of_the_pixels():
    images = RNG.integers(0, 256, (6, *SIZE, 3), np.uint8)
    mixed, own = mix(images)
    pixels = images / 255.0
    for i in range(6):
        partner = pixels[5 - i]
        shares = (mixed[i] - partner) / np.where(pixels[i] == partner, np.nan, pixels[i] - partner)
        shares = np.nanmean(shares, axis=-1)  # [H, W]
        blended = shares.std() < 1e-4
        assert blended or set(shares.round(4).ravel()) <= {0.0, 1.0}
        np.testing.assert_allclose(own[i], shares.mean(), atol=1e-4)
        kept = shares[..., None]
        np.testing.assert_allclose(mixed[i], kept * pixels[i] + (1 - kept) * partner, atol=1e-4)


def test_blended_shares_are_a_beta_distributions():
    maps, own = own_pixels(cutmix=0.0)
    assert np.ptp(maps, axis=(1, 2)).max() == 0
    np.testing.assert_allclose(maps[:, 0, 0], own, atol=1e-6)
    np.testing.assert_allclose(own.mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(own.var(), 1 / (4 * (2 * 0.8 + 1)), rtol=0.05)


def test_cut_boxes_are_timms():
    maps, own = own_pixels(mixup=0.0)
    assert set(np.unique(maps)) == {0.0, 1.0}
    for kept in maps[:200]:  # what is cut is one box
        rows, columns = (~kept.astype(bool)).any(1), (~kept.astype(bool)).any(0)
        assert (kept == 1 - np.outer(rows, columns)).all()
        assert all(np.diff(np.flatnonzero(line)).max(initial=1) == 1 for line in (rows, columns))
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), own, atol=1e-6)
    generator = np.random.default_rng(1)
    expected = np.array([plain_cut(generator, *SIZE) for _ in range(10_000)])
    levels, shares = np.linspace(0.02, 0.98, 25), expected.mean(axis=(1, 2))
    np.testing.assert_allclose(np.quantile(own, levels), np.quantile(shares, levels), atol=0.04)
    np.testing.assert_allclose(maps.mean(axis=0), expected.mean(axis=0), atol=0.035)


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_the_switch_chooses_the_way(switch):
    maps, _ = own_pixels(switch=switch)
    blended = (np.ptp(maps, axis=(1, 2)) == 0) & (maps[:, 0, 0] % 1 != 0)
    np.testing.assert_allclose(1 - blended.mean(), switch, atol=0.03 if 0 < switch < 1 else 0)


def test_a_rows_draws_are_its_own():
    """Not the batch's: the first of 3 rows keeps the share that it has among 6."""
    images = RNG.random((6, *SIZE, 3)).astype(np.float32)
    _, six = mix(images)
    _, three = mix(images[:3], number=6)
    np.testing.assert_array_equal(three, six[:3])
    assert len(set(six)) == 6


def classification(**changes):
    tree = tiny.config("classify", classify__mixup=0.8, classify__cutmix=1.0, **changes)
    return Classification(make_classifier(tree, 10), tuple("0123456789"), tree)


def timms_loss(logits, labels, own, smoothing):
    """Cross-entropy with soft targets: smoothed first, then mixed with the reversed batch's."""
    one_hot = np.full((len(labels), 10), smoothing / 10)
    one_hot[np.arange(len(labels)), labels] += 1 - smoothing
    target = own[:, None] * one_hot + (1 - own[:, None]) * one_hot[::-1]
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(target * log_probabilities).sum(-1)


def test_the_loss_is_that_of_timms_soft_targets():
    parts = classification()
    labels = RNG.integers(0, 10, 6).astype(np.int32)
    images = RNG.integers(0, 256, (6, 8, 8, 1), np.uint8)
    batch = jax.jit(parts.augment)({"image": images, "label": labels}, keys_of(6))
    logits = RNG.normal(size=(6, 10)).astype(np.float32) * 3
    keys = keys_for(keys_of(6), Purpose.MIX)
    mixed, own = JITTED(keys, images, mixup=0.8, cutmix=1.0, switch=0.5)
    np.testing.assert_allclose(batch["image"], mixed, atol=1e-6)
    own = np.asarray(own)
    assert 0.1 < own.std()
    loss, weight = parts.sums(logits, batch, 0.1)["loss"]
    assert weight == pytest.approx(6)
    expected = timms_loss(logits, labels, own, 0.1)
    assert float(loss) == pytest.approx(expected.sum(), rel=1e-5)
    unsmoothed = parts.sums(logits, batch, 0.0)["loss"][0]
    assert float(unsmoothed) == pytest.approx(timms_loss(logits, labels, own, 0.0).sum(), rel=1e-5)

    # Where one of two labels is unknown, the other counts by its share.
    batch["label"] = batch["label"].at[0, 1].set(-1).at[5, 0].set(-1)
    loss, weight = parts.sums(logits, batch, 0.0)["loss"]
    assert float(weight) == pytest.approx(4 + own[0] + (1 - own[5]))
    alone = timms_loss(logits, labels, np.ones(6), 0.0)
    other = timms_loss(logits, labels[::-1], np.ones(6), 0.0)
    parted = timms_loss(logits, labels, own, 0.0)[1:5].sum()
    known = own[0] * alone[0] + (1 - own[5]) * other[5]
    assert float(loss) == pytest.approx(parted + known, rel=1e-5)


def test_top_five_and_what_padding_and_few_classes_do():
    parts = classification()
    logits = np.tile(np.arange(10.0, dtype=np.float32), (4, 1))
    batch = {
        "label": np.array([9, 5, 4, 9], np.int32),  # first, fifth, sixth, and padding
        "valid": np.array([True, True, True, False]),
    }
    found = {name: (float(a), float(b)) for name, (a, b) in parts.sums(logits, batch, 0.0).items()}
    assert found["accuracy"] == (1, 3) and found["top5_accuracy"] == (2, 3)
    few = parts._replace(names=tuple("01234"))
    assert set(few.sums(logits[:, :5], batch, 0.0)) == {"loss", "accuracy"}


def plain_erased(generator, height, width):
    """The share of an image and the aspect of timm's box; None where no try fits."""
    for _ in range(10):
        area = generator.uniform(0.02, 1 / 3) * height * width
        aspect = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if h < height and w < width:
            return h * w / (height * width), h / w
    return None


def test_erased_boxes_are_timms_and_hold_noise():
    images = np.full((ROWS, *SIZE, 2), 7.0, np.float32)  # no such noise
    keys, mean, std = keys_of(ROWS), (0.4, 0.5), (0.2, 0.3)
    out = np.asarray(jax.jit(lambda k, x: augment.erase(k, x, 0.25, mean, std))(keys, images))
    gone = (out != 7.0).all(-1)
    np.testing.assert_array_equal(gone, (out != 7.0).any(-1))
    hit = gone.any(axis=(1, 2))
    np.testing.assert_allclose(hit.mean(), 0.25, atol=0.02)
    for box in gone[hit][:100]:
        assert (box == np.outer(box.any(1), box.any(0))).all()
    noise = (out[gone] - mean) / std
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(noise.std(0), 1, atol=0.02)
    generator = np.random.default_rng(2)
    plain = np.array([p for _ in range(20_000) if (p := plain_erased(generator, *SIZE))])
    levels = np.linspace(0.05, 0.95, 19)
    for found, expected, tolerance in (
        (gone[hit].mean(axis=(1, 2)), plain[:, 0], 0.02),
        (np.log(gone[hit].any(2).sum(1) / gone[hit].any(1).sum(1)), np.log(plain[:, 1]), 0.15),
    ):
        found, expected = np.quantile(found, levels), np.quantile(expected, levels)
        np.testing.assert_allclose(found, expected, atol=tolerance)
    places = gone[hit].mean(axis=0)
    np.testing.assert_allclose(places, places[::-1, ::-1], atol=0.09)
    everything = augment.erase(keys[:50], images[:50], 1.0, mean, std)
    assert (np.asarray(everything) != 7.0).any(axis=(1, 2, 3)).mean() > 0.95
    untouched = augment.erase(keys[:50], images[:50], 0.0, mean, std)
    np.testing.assert_array_equal(untouched, images[:50])


class Linear(nn.Module):
    """As small a classifier as there is, in place of a transformer."""

    @nn.compact
    def __call__(self, images, drop_keys=None):
        return nn.Dense(10)(images.reshape(len(images), -1))


def three_updates(devices, microbatches, change=lambda task: task):
    """Losses, accuracies and gradient norms of mixed random images."""
    parts = classification()._replace(model=Linear())
    task = Task({}, parts.init, parts.loss_fn, parts.eval_fn, mean_of_sums, {}, parts.predict)
    task, mesh = change(task._replace(augment=parts.augment)), sharding.make_mesh(1, devices)
    step = train.make_train_step(
        task, optax.sgd(0.1), mesh, seed=0, microbatches=microbatches, ema_decay=0.0
    )
    state = train.create_state(*task.init(jax.random.key(0)), optax.sgd(0.1), ema=False)
    generator, values = np.random.default_rng(3), []
    for _ in range(3):
        images = generator.integers(0, 256, (16, 8, 8, 1), np.uint8)
        labels = generator.integers(0, 10, 16).astype(np.int32)
        batch = sharding.put_batch({"image": images, "label": labels}, mesh)
        state, found = step(state, {}, batch)
        values.append([float(found[name]) for name in ("loss", "accuracy", "grad_norm")])
    return np.array(values)


@pytest.fixture(scope="module")
def one_device():
    return three_updates(jax.devices()[:1], 1)


def test_devices_and_microbatches_change_nothing(one_device):
    np.testing.assert_allclose(three_updates(jax.devices(), 2), one_device, rtol=1e-5)


def test_mixing_within_microbatches_would_show(one_device):
    """In the twin a row's partner is of its own microbatch."""

    def twin(task):
        def loss_fn(params, model_state, frozen, batch, keys, step):
            return task.loss_fn(params, model_state, frozen, task.augment(batch, keys), keys, step)

        return task._replace(augment=lambda batch, keys: batch, loss_fn=loss_fn)

    apart = three_updates(jax.devices()[:1], 2, twin)
    assert np.abs(apart - one_device).max() > 1e-2
