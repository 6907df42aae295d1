"""RandAugment's operations against closed forms, its draws, and its place in the pipeline."""

import numpy as np
import pytest
import tiny

from beit_jax.data import pipeline, rand_augment
from beit_jax.data.rand_augment import Step
from beit_jax.data.record import Record
from beit_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(20, 220, (40, 30, 3), np.uint8)
MEAN = (0.1, 0.5, 0.9)
FILL = (26, 128, 230)


def after(operation: str, image=IMAGE, level=0.9, sign=1, mean=MEAN):
    out = rand_augment.apply(image, [Step(operation, level, sign)], mean)
    assert out.dtype == np.uint8 and out.shape == image.shape
    return out.astype(int)


def grey(image):
    return image @ np.array([0.299, 0.587, 0.114])


def autocontrast(image):
    low, high = image.min((0, 1)), image.max((0, 1))
    return (image - low) * (255 / (high - low))


def equalize(image):
    """Every value to the share of the channel's pixels below it, Pillow's whole numbers."""
    out = np.empty(image.shape)
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        out[..., channel] = np.clip((step // 2 + below) // step, 0, 255)[image[..., channel]]
    return out


def blend(image, other, sign):
    """0.9 x 0.9 away from no change, cut to what a byte holds."""
    return np.clip(other + (1 + 0.81 * sign) * (image - other), 0, 255)


def smooth(image):
    """Pillow's SMOOTH kernel; the edge stays."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    out, inner = image.astype(float), image[1:-1, 1:-1]
    out[1:-1, 1:-1] = sum(
        kernel[y, x] * image[y : y + len(inner), x : x + inner.shape[1]]
        for y in range(3)
        for x in range(3)
    )
    return out


COLOURS = {
    "autocontrast": lambda x, sign: autocontrast(x),
    "equalize": lambda x, sign: equalize(x),
    "invert": lambda x, sign: 255 - x,
    "posterize": lambda x, sign: x // 128 * 128,  # 4 - int(3.6) = 1 bit is kept
    "solarize": lambda x, sign: np.where(x < 26, x, 255 - x),  # 256 - int(230.4)
    "solarize_add": lambda x, sign: np.where(x < 128, np.minimum(x + 99, 255), x),
    "color": lambda x, sign: blend(x, grey(x)[..., None], sign),
    "contrast": lambda x, sign: blend(x, grey(x).mean(), sign),
    "brightness": lambda x, sign: blend(x, 0.0, sign),
    "sharpness": lambda x, sign: blend(x, smooth(x), sign),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colour_operations_are_their_formulas(name):
    for sign in (1, -1):
        np.testing.assert_allclose(after(name, sign=sign), COLOURS[name](IMAGE, sign), atol=1.6)


def test_the_lowest_level_changes_nothing_and_the_highest_is_the_published():
    for name in ("color", "contrast", "brightness", "sharpness", "rotate", "shear_x", "shear_y",
                 "translate_x", "translate_y", "solarize_add", "solarize"):  # fmt: skip
        np.testing.assert_array_equal(after(name, level=0.0), IMAGE)
    np.testing.assert_array_equal(after("posterize", level=0.0), IMAGE // 16 * 16)  # 4 bits
    np.testing.assert_array_equal(after("posterize", level=1.0), 0)
    np.testing.assert_array_equal(after("solarize", level=1.0), 255 - IMAGE.astype(int))


def turned(x, y, sign):
    """Where a rotation by 27 degrees, counter-clockwise in the picture, takes a pixel from."""
    angle = np.deg2rad(27 * sign)
    x, y = x - 14.5, y - 19.5  # the centre of 40 rows and 30 columns
    return np.cos(angle) * x - np.sin(angle) * y + 14.5, np.sin(angle) * x + np.cos(
        angle
    ) * y + 19.5


MOVES = {
    "shear_x": lambda x, y, sign: (x + 0.27 * sign * (y + 0.5), y),
    "shear_y": lambda x, y, sign: (x, y + 0.27 * sign * (x + 0.5)),
    "translate_x": lambda x, y, sign: (x + 0.405 * 30 * sign, y),
    "translate_y": lambda x, y, sign: (x, y + 0.405 * 40 * sign),
    "rotate": turned,
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_take_pixels_from_where_they_should(name):
    """On a slope each pixel says where it is from, but for what Pillow's bicubic kernel bends."""
    y, x = np.mgrid[:40, :30]
    slope = np.stack([5 * x + 40, 4 * y + 40, 2 * x + 2 * y + 40], axis=-1).astype(np.uint8)
    for sign in (1, -1):
        from_x, from_y = MOVES[name](x, y, sign)
        expected = np.stack([5 * from_x, 4 * from_y, 2 * (from_x + from_y)], axis=-1) + 40
        inside = (from_x > 2) & (from_x < 27) & (from_y > 2) & (from_y < 37)
        outside = (from_x < -1) | (from_x > 30) | (from_y < -1) | (from_y > 40)
        found = after(name, slope, sign=sign)
        assert inside.mean() > 0.3 and outside.any()
        np.testing.assert_allclose(found[inside], expected[inside], atol=1.7)
        assert (found[outside] == FILL).all()


def test_the_five_moves_and_ten_colours_are_all():
    assert set(rand_augment.OPERATIONS) == {*COLOURS, *MOVES}


def test_images_of_one_channel_and_plans_of_two_steps():
    image = IMAGE[..., :1]
    for name in COLOURS:
        after(name, image, mean=(0.5,))
    np.testing.assert_array_equal(after("color", image, mean=(0.5,)), image)
    assert after("translate_x", image, level=1.0, mean=(0.5,))[0, -1, 0] == 128
    assert (after("translate_x", level=1.0, mean=(0.5,))[0, -1] == 128).all()
    both = rand_augment.apply(IMAGE, [Step("invert", 1, 1), Step("posterize", 0.0, 1)], MEAN)
    np.testing.assert_array_equal(both, (255 - IMAGE) // 16 * 16)
    np.testing.assert_array_equal(rand_augment.apply(IMAGE, [], MEAN), IMAGE)


def test_draws_are_as_published():
    generator = np.random.default_rng(1)
    plans = [rand_augment.draw(generator, 9.0) for _ in range(6_000)]
    numbers = np.bincount([len(plan) for plan in plans], minlength=3) / len(plans)
    np.testing.assert_allclose(numbers, [0.25, 0.5, 0.25], atol=0.02)
    steps = [step for plan in plans for step in plan]
    _, counts = np.unique([step.operation for step in steps], return_counts=True)
    assert len(counts) == 15 and abs(counts / len(steps) - 1 / 15).max() < 0.012
    levels = np.array([step.level for step in steps])
    # Of N(0.9, 0.05), a fortieth lies above 1 and is cut to it.
    assert levels.max() == 1 and 0.015 < (levels == 1).mean() < 0.032
    np.testing.assert_allclose([levels.mean(), np.median(levels)], 0.9, atol=0.003)
    np.testing.assert_allclose(levels.std(), 0.05, rtol=0.06)
    np.testing.assert_allclose(np.mean([step.sign for step in steps]), 0.0, atol=0.04)


class Pictures:
    """Forty pictures in memory; a `Source`."""

    class_names = ("a",)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), np.uint8)
        return Record(pixels, 0, str(index))


def batches(magnitude, workers=0, number=3, size=8, **processes):
    augmentation = pipeline.Augmentation((0.3, 1.0), (0.75, 1.33), 0.5, magnitude, MEAN)
    views = {"image": pipeline.View((16, 16), "bicubic"), "small": pipeline.View((8, 8), "box")}
    found = pipeline.train_batches(
        Pictures(), views, augmentation, batch_size=size, seed=1, workers=workers, **processes
    )
    return [next(found) for _ in range(number)]


def test_the_pipeline_augments_by_seed_and_position_alone():
    alone, threads = batches(9.0), batches(9.0, workers=3)
    halves = [batches(9.0, process_index=i, process_count=2) for i in range(2)]
    for i, batch in enumerate(alone):
        for name in ("image", "small"):
            np.testing.assert_array_equal(batch[name], threads[i][name])
            joined = np.concatenate([half[i][name] for half in halves])
            np.testing.assert_array_equal(batch[name], joined)


def test_a_quarter_is_left_as_it_was_and_both_views_share_a_fate():
    """Crop and flip do not depend on it, so what it left alone is the same without it."""
    with_it, without = batches(9.0, number=20), batches(0.0, number=20)
    same = {
        name: np.concatenate(
            [(a[name] == b[name]).all((1, 2, 3)) for a, b in zip(with_it, without, strict=True)]
        )
        for name in ("image", "small")
    }
    assert 0.15 < same["image"].mean() < 0.4
    assert (same["image"] == same["small"]).mean() > 0.9  # some change few pixels


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__rand_augment": 11.0}, "config.data.rand_augment=11.0 must be from 0 to 10"),
        (
            {"data__rand_augment": 9.0, "data__channels": 4},
            "must be 0 where data.channels is neither",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        tiny.run(tiny.config("classify", **changes), tmp_path)
