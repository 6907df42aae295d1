"""Batches: order and augmentation from (seed, position) alone, bad images, padded evaluation."""

import itertools
import math
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from beit_jax.data.bad_files import BadFiles
from beit_jax.data.geometry import (
    DRAWS,
    Box,
    center_box,
    random_crop,
    resize,
    resize_quickly,
)
from beit_jax.data.pipeline import (
    Augmentation,
    View,
    eval_batches,
    train_batches,
)
from beit_jax.data.reader import generator, shuffled_index
from beit_jax.data.record import Record
from beit_jax.errors import UserError

pytestmark = pytest.mark.smoke

VIEWS = {"image": View((16, 16), "bicubic"), "token_image": View((8, 8), "lanczos")}
AUGMENT = Augmentation(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5)
WHOLE = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)


class Memory:
    """A source of random pictures; the label is the index; some cannot be read."""

    def __init__(self, length: int, bad=(), shape=(20, 24, 3)):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (length, *shape), np.uint8)
        self.bad, self.class_names = set(bad), tuple(map(str, range(length)))
        self.description = self.fingerprint = "memory"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.bad:
            return Record(b"broken", index, self.name(index))
        return Record(self.images[index], index, self.name(index))

    def name(self, index):
        return f"picture {index}.png"


def take(iterator, count: int) -> list[dict]:
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def train(source, count, augmentation=AUGMENT, **options):
    options = {"batch_size": 8, "seed": 3, "workers": 2, **options}
    return take(train_batches(source, VIEWS, augmentation, **options), count)


def joined(batches: list[dict]) -> dict:
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_equal(actual: list[dict], wanted: list[dict]):
    assert len(actual) == len(wanted)
    for one, other in zip(actual, wanted, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_batches_have_the_promised_form():
    (batch,) = train(Memory(10), 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((8, 16, 16, 3), np.uint8),
        "token_image": ((8, 8, 8, 3), np.uint8),
        "label": ((8,), np.int32),
    }


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_rows_of_the_same_batches(processes):
    source = Memory(13, bad=[2])
    whole = train(source, 5, max_bad_share=0.5)
    options = {"process_count": processes, "max_bad_share": 0.5}
    parts = [train(source, 5, process_index=p, **options) for p in range(processes)]
    assert_equal([joined(rows) for rows in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_workers_change_nothing(workers):
    assert_equal(train(Memory(13), 5, workers=workers), train(Memory(13), 5))


@pytest.mark.parametrize("start", [1, 3])
def test_start_is_the_same_as_skipping(start):
    assert_equal(train(Memory(13), 3, start=start), train(Memory(13), start + 3)[start:])


def test_start_costs_nothing_however_far():
    (batch,) = train(Memory(13), 1, start=10**12)
    assert batch["image"].shape == (8, 16, 16, 3)


def test_seed_changes_order_and_augmentation():
    one, same, other = (joined(train(Memory(40), 5, seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one["image"], same["image"])
    assert (one["label"] != other["label"]).mean() > 0.8
    # The same example at the same place, but under another seed: another crop.
    same_label = [joined(train(Memory(1), 1, seed=seed)) for seed in (0, 1)]
    assert (same_label[0]["image"] != same_label[1]["image"]).mean() > 0.5


def test_every_epoch_is_another_permutation():
    labels = joined(train(Memory(13), 13))["label"].reshape(8, 13)
    assert (np.sort(labels) == np.arange(13)).all()
    assert len({tuple(epoch) for epoch in labels}) == 8


@pytest.mark.parametrize("length", [50, 2000])  # small sources are permuted in another way
def test_no_epoch_of_one_seed_is_an_epoch_of_another(length):
    def order(seed, epoch):
        return tuple(shuffled_index(epoch * length + i, seed, length) for i in range(length))

    assert sorted(order(0, 0)) == list(range(length))

    orders = {order(seed, epoch) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


def test_chance_is_philox_keyed_by_seed_and_position():
    keyed = np.random.Generator(np.random.Philox(key=np.array([7, 2**40], np.uint64)))
    np.testing.assert_array_equal(generator(2**40, 7).random(9), keyed.random(9))


def test_an_example_is_cut_anew_in_every_epoch():
    images = joined(train(Memory(1), 2))["image"]
    assert len({image.tobytes() for image in images}) == 16


def test_views_are_resizes_of_one_crop():
    """A picture whose pixels say where they are: both views must show the same place."""
    ramp = np.zeros((200, 300, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 300).astype(np.uint8)
    ramp[..., 1] = np.linspace(0, 255, 200).astype(np.uint8)[:, None]
    source = Memory(1)
    source.images = ramp[None]
    batch = joined(train(source, 4))
    large = batch["image"].reshape(-1, 8, 2, 8, 2, 3).mean((2, 4))
    difference = np.abs(large - batch["token_image"])[:, 1:-1, 1:-1]
    assert difference.max() < 3
    corners = batch["image"][:, [0, -1], :, :][..., :2].astype(int)
    assert np.ptp(corners[:, 0, 0, 1]) > 20  # the crops do differ
    flipped = corners[:, 0, 0, 0] > corners[:, 0, -1, 0]
    assert 0 < flipped.sum() < len(flipped)


def test_flip_is_all_or_nothing_at_its_ends():
    plain, flipped = (
        joined(train(Memory(9), 2, AUGMENT._replace(flip=flip))) for flip in (0.0, 1.0)
    )
    np.testing.assert_array_equal(plain["image"][:, :, ::-1], flipped["image"])


def test_random_crops_have_the_wanted_distribution():
    rng, height, width = np.random.default_rng(0), 400, 500
    boxes = np.array(
        [random_crop(height, width, (0.08, 1.0), (3 / 4, 4 / 3), rng.random(DRAWS))
         for _ in range(4000)]
    )  # fmt: skip
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    share, ratio = h * w / (height * width), w / h
    assert 0.075 < share.min() < 0.1 and share.max() > 0.9
    assert ratio.min() > 0.73 and ratio.max() < 1.36
    small = share < 0.5  # always fit at the first try: uniform and log-uniform there
    assert abs(share[small].mean() - 0.29) < 0.01
    assert abs(np.log(ratio[small]).mean()) < 0.02
    assert abs(np.log(ratio[small]).std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    place = (left / np.maximum(width - w, 1))[small]
    assert abs(place.mean() - 0.5) < 0.02 and abs(place.std() - math.sqrt(1 / 12)) < 0.02


@pytest.mark.parametrize(
    "height, width, wanted",
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 1, (0, 0, 1, 1))],
)
def test_crops_that_do_not_fit_fall_back_to_the_centre(height, width, wanted):
    draws = np.full(DRAWS, 0.5)
    assert random_crop(height, width, (1.0, 1.0), (3 / 4, 4 / 3), draws) == wanted


@pytest.mark.parametrize("height, width", [(300, 451), (451, 300), (256, 256), (224, 1000), (9, 7)])
@pytest.mark.parametrize("share", [0.875, 1.0])
def test_evaluation_is_resize_and_centre_crop(height, width, share):
    """Against the two steps done one after the other, as torchvision does them."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    size = 32
    short = int(size / share)
    if width < height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    both = Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC)
    wanted = np.asarray(both.crop((left, top, left + size, top + size)))
    box = center_box(height, width, (size, size), share)
    actual = resize(image, View((size, size), "bicubic"), box)
    # The two steps round to 8 bits between Pillow's two passes over different rows; no more.
    assert np.abs(actual.astype(int) - wanted).max() <= 1


def test_evaluation_of_a_view_that_is_not_square():
    assert center_box(100, 100, (50, 100), 1.0) == Box(0, 25, 100, 75)
    box = center_box(200, 100, (50, 100), 0.5)
    assert (box.left, box.right) == (25, 75) and (box.top, box.bottom) == (87.5, 112.5)


@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "bicubic", "lanczos"])
def test_interpolations_are_pillows(name):
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    wanted = Image.fromarray(image).resize((9, 12), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(resize(image, View((12, 9), name)), np.asarray(wanted))


def test_all_channels_are_resized_alike():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 5), np.uint8)
    view = View((12, 9), "lanczos")
    for first in range(3):
        three = np.ascontiguousarray(image[..., first : first + 3])
        np.testing.assert_array_equal(
            resize(image, view)[..., first : first + 3], resize(three, view)
        )
    assert resize(image[..., :1], view).shape == (12, 9, 1)


def evaluate(source, count=None, **options):
    options = {"batch_size": 8, "eval_crop": 1.0, "workers": 2, **options}
    return list(itertools.islice(eval_batches(source, VIEWS, **options), count))


@pytest.mark.parametrize("length, processes", [(13, 1), (13, 2), (16, 4), (3, 4)])
def test_evaluation_counts_every_image_once(length, processes):
    parts = [
        evaluate(Memory(length), process_index=p, process_count=processes) for p in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1  # or processes would wait for each other
    everything = joined([joined(rows) for rows in zip(*parts, strict=True)])
    np.testing.assert_array_equal(everything["index"], np.arange(len(everything["index"])))
    np.testing.assert_array_equal(everything["valid"], everything["index"] < length)
    np.testing.assert_array_equal(everything["label"][:length], np.arange(length))
    assert (everything["label"][length:] == -1).all()
    assert len(everything["index"]) == 8 * math.ceil(length / 8)
    assert everything["valid"].dtype == bool and everything["index"].dtype == np.int32
    assert everything["image"][:length].std() > 10


def test_evaluation_leaves_unreadable_images_out():
    batch = joined(evaluate(Memory(13, bad=[4, 9]), max_bad_share=0.2))
    assert set(np.flatnonzero(~batch["valid"])) == {4, 9, 13, 14, 15}
    good = joined(evaluate(Memory(13)))
    np.testing.assert_array_equal(
        batch["image"][batch["valid"]], np.delete(good["image"], [4, 9, 13, 14, 15], 0)
    )


def test_an_unreadable_image_gives_way_to_the_next_and_nothing_shifts(tmp_path):
    listing = tmp_path / "run" / "bad_files.txt"
    good = joined(train(Memory(20), 10))
    bad = joined(train(Memory(20, bad=[5, 11]), 10, max_bad_share=0.1, bad_files=listing))
    replaced = np.isin(good["label"], [5, 11])
    assert replaced.sum() == 8
    np.testing.assert_array_equal(bad["label"][~replaced], good["label"][~replaced])
    np.testing.assert_array_equal(bad["image"][~replaced], good["image"][~replaced])
    assert not np.isin(bad["label"], [5, 11]).any()
    order = [shuffled_index(p, 3, 20) for p in range(80)]
    for position in np.flatnonzero(replaced):
        epoch, place = divmod(int(position), 20)
        following = [order[epoch * 20 + (place + step) % 20] for step in range(3)]
        wanted = next(label for label in following if label not in (5, 11))
        assert bad["label"][position] == wanted
    lines = sorted(listing.read_text().splitlines())
    assert [line.split("\t")[0] for line in lines] == ["picture 11.png", "picture 5.png"]
    assert all("broken" in line for line in lines)
    # A second run adds nothing to the list.
    train(Memory(20, bad=[5, 11]), 10, max_bad_share=0.1, bad_files=listing)
    assert sorted(listing.read_text().splitlines()) == lines


def test_processes_list_an_image_once_between_them(tmp_path):
    one, other = (BadFiles(9, 1.0, tmp_path / "bad_files.txt") for _ in range(2))
    odd = b"\xff \xc3\xa9.png".decode(errors="surrogateescape")
    for lister in (one, other, one):
        for index, name in ((0, "a.png"), (1, odd), (2, f"{id(lister)}.png")):
            lister.add(index, name, "two\nlines")
    lines = (tmp_path / "bad_files.txt").read_text().splitlines()
    names = ["a.png", r"\udcff é.png", f"{id(one)}.png", f"{id(other)}.png"]
    assert lines == [f"{name}\ttwo lines" for name in names]


def test_too_many_unreadable_images_end_the_run(tmp_path):
    listing = tmp_path / "bad_files.txt"
    source = Memory(20, bad=[5, 11, 12])
    assert len(train(source, 10, max_bad_share=0.15)) == 10  # the share itself is tolerated
    with pytest.raises(UserError) as error:
        train(source, 10, max_bad_share=0.14, bad_files=listing)
    message = str(error.value)
    for word in (
        "3 of 20 images (15.0%)",
        "config.data.max_bad_share=0.14",
        ".png: ",
        str(listing),
    ):
        assert word in message
    with pytest.raises(UserError, match="config.data.max_bad_share"):
        evaluate(source, max_bad_share=0.1)


def test_all_images_unreadable_ends_at_once_whatever_the_share():
    with pytest.raises(UserError, match="6 images in a row"):
        train(Memory(6, bad=range(6)), 1, max_bad_share=1.0)
    with pytest.raises(UserError, match="100 images in a row"):
        train(Memory(200, bad=range(200)), 1, max_bad_share=1.0)


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"5 channels where config\.data\.channels is 3"):
        train(Memory(200, shape=(4, 4, 5)), 1)
    assert train(Memory(9, shape=(4, 4, 5)), 1, channels=5)[0]["image"].shape == (8, 16, 16, 5)


def test_a_file_that_vanishes_is_unreadable():
    class Vanishing(Memory):
        def __getitem__(self, index):
            if index == 3:
                raise FileNotFoundError(2, "gone", "three.png")
            return super().__getitem__(index)

    batch = joined(evaluate(Vanishing(8), max_bad_share=0.5))
    assert list(np.flatnonzero(~batch["valid"])) == [3]


def test_errors_of_the_code_are_not_swallowed():
    class Buggy(Memory):
        def __getitem__(self, index):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(Buggy(8), 1)


def test_mistakes_are_told_before_anything_is_read():
    with pytest.raises(UserError, match="batch of 8 .* 3 processes"):
        train_batches(Memory(8), VIEWS, AUGMENT, batch_size=8, seed=0, process_count=3)
    views = {"image": View((8, 8), "bicubik")}
    with pytest.raises(UserError, match="'bicubik' .* bicubic"):
        eval_batches(Memory(8), views, batch_size=8, eval_crop=1.0)


def grain_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "grain" in thread.name]


@pytest.mark.parametrize("consumed", [0, 2])
def test_close_stops_the_threads(consumed):
    before = len(grain_threads())
    iterator = train_batches(Memory(50), VIEWS, AUGMENT, batch_size=8, seed=0, workers=3)
    for _ in range(consumed):
        next(iterator)
    assert consumed == 0 or len(grain_threads()) > before
    iterator.close()
    deadline = time.monotonic() + 5
    while len(grain_threads()) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(grain_threads()) <= before


def test_a_program_ends_without_closing():
    code = """
        import sys; sys.path.insert(0, "tests")
        from test_data_pipeline import *
        iterator = train_batches(Memory(50), VIEWS, AUGMENT, batch_size=8, seed=0, workers=3)
        next(iterator)
        print("last line")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.strip(), done.returncode) == ("last line", 0), done.stderr
    assert not done.stderr, done.stderr


@pytest.mark.parametrize("sides", [(448,), (224, 112), (100, 64)])
def test_training_resizes_photographs_as_pillow_does(sides):
    views = [View((side, side), "bicubic") for side in sides]
    chance, image = np.random.default_rng(0), load_sample_image("china.jpg")
    for _ in range(16):
        top, left, height, width = random_crop(
            *image.shape[:2], (0.05, 1.0), (3 / 4, 4 / 3), chance.random(DRAWS)
        )
        crop = np.ascontiguousarray(image[top : top + height, left : left + width])
        for view in views:
            error = np.square(resize_quickly(crop, view) - resize(crop, view).astype(float)).mean()
            assert 10 * np.log10(255**2 / error) > 37, (height, width, view)


def test_training_keeps_every_channel_and_what_pillow_alone_can_do():
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 5), np.uint8)
    mixed, one = View((200, 299), "bicubic"), image[..., :1]
    assert resize_quickly(image, mixed).shape == (200, 299, 5)
    assert resize_quickly(one, mixed).shape == (200, 299, 1)
    exact = [View((200, 200), "nearest"), View((100, 100), "nearest"), View((60, 60), "bicubic")]
    for view in exact:
        np.testing.assert_array_equal(resize_quickly(image, view), resize(image, view))
