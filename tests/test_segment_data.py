"""Images with label maps: pairs, numbers of classes, one cut for both, and what is refused."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from beit_jax.data import scenes
from beit_jax.data.decode import BadImage, decode, read_size
from beit_jax.data.digits import digits
from beit_jax.data.masks import LabelMap, Labels
from beit_jax.data.pipeline import (
    Augmentation,
    Scenes,
    View,
    eval_batches,
    eval_shapes,
    train_batches,
)
from beit_jax.data.reader import generator
from beit_jax.data.record import Record
from beit_jax.data.sources import FewLabels, open_source
from beit_jax.errors import UserError

pytestmark = pytest.mark.smoke

SCENES = Scenes(
    size=(16, 16),
    interpolation="nearest",
    short_side=16,
    resize=(0.5, 2.0),
    max_category=1.0,
    fill=(201, 202, 203),
    labels=Labels(150, True),
    sides=(16,),
)
FLIP = Augmentation((1.0, 1.0), (1.0, 1.0), 0.5)


def png(pixels, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, "png", **options)
    return file.getvalue()


def write(root, name: str, pixels):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels))


def picture(height, width, seed=0):
    """A label map of ADE20K's numbers and an image that shows them: red is the label."""
    labels = np.random.default_rng(seed).integers(0, 151, (height, width), np.uint8)
    return labels, np.stack([labels, 255 - labels, np.full_like(labels, 7)], axis=-1)


def scene_folder(root, layout="ade", sizes=((20, 30), (24, 17), (16, 16), (15, 40))):
    for i, (height, width) in enumerate(sizes):
        labels, image = picture(height, width, i)
        split = "" if layout == "flat" else ("training/" if i % 2 else "validation/")
        write(root, f"images/{split}scene_{i}.png", image)
        write(root, f"annotations/{split}scene_{i}.png", labels)
    return f"folder:{root}"


class Memory:
    """A source of random scenes; label maps of some cannot be read."""

    mask_classes = class_names = ()
    description = "memory"

    def __init__(self, sizes, bad=()):
        self.pairs = [picture(*size, seed) for seed, size in enumerate(sizes)]
        self.bad = bad

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return Record(self.pairs[index][1], -1, self.name(index))

    def name(self, index):
        return f"{index}.png"

    def mask(self, index):
        return LabelMap(b"broken" if index in self.bad else self.pairs[index][0], f"{index}.png")


# Folders


@pytest.mark.parametrize("layout", ["ade", "flat"])
def test_images_and_label_maps_are_paired_by_path(tmp_path, layout):
    path = scene_folder(tmp_path, layout, sizes=[(9, 9)] * 12)
    seen = []
    for split in ("train", "validation"):
        source = open_source(path, split, holdout=0.3)
        assert source.class_names == source.mask_classes == () and (source.labels() == -1).all()
        for i in range(len(source)):
            image = decode(source[i].image, channels=3, max_value=255)
            label_map = source.mask(i)
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(label_map.labels))), image[..., 0]
            )
            assert label_map.name == source[i].name.replace("images", "annotations")
            seen.append(source.name(i))
    assert len(set(seen)) == 12
    everything = open_source(path, "all")
    assert [everything.name(i) for i in range(12)] == sorted(seen)
    assert everything.mask(3).name == everything[3].name.replace("images", "annotations")
    if layout == "ade":  # folders are the splits
        assert all(("training" in name) == (i < 6) for i, name in enumerate(seen))


def test_a_label_maps_ending_may_differ_and_names_of_folders_too(tmp_path):
    labels, image = picture(9, 9)
    (tmp_path / "images/val").mkdir(parents=True)
    Image.fromarray(image).save(tmp_path / "images/val/a.jpg")
    write(tmp_path, "annotations/validation/a.png", labels)
    write(tmp_path, "images/train/deep/b.png", image)
    write(tmp_path, "annotations/training/deep/b.png", labels)
    held = open_source(f"folder:{tmp_path}", "validation")
    assert (held[0].name, held.mask(0).name) == (
        "images/val/a.jpg",
        "annotations/validation/a.png",
    )
    with pytest.raises(UserError, match="has no split 'test': it has train, val"):
        open_source(f"folder:{tmp_path}", "test")


def test_what_is_alone_is_refused_by_name(tmp_path):
    path = scene_folder(tmp_path)
    lonely = tmp_path / "images/training/lonely.jpg"
    lonely.write_bytes(b"")
    with pytest.raises(UserError, match="1 files below .*images/training have no label map .*lone"):
        open_source(path, "train")
    lonely.unlink()
    (tmp_path / "images/training/scene_1.png").unlink()
    with pytest.raises(UserError, match="annotations/training have no image .*scene_1.png"):
        open_source(path, "train")
    for folder in ("images", "annotations"):
        for file in (tmp_path / folder / "training").iterdir():
            file.unlink()
    with pytest.raises(UserError, match="no image below .*images/training"):
        open_source(path, "train")
    for ending in ("png", "jpg"):
        write(tmp_path, f"images/training/x.{ending}", np.zeros((2, 2), np.uint8))
    with pytest.raises(UserError, match="x.* differ in their ending alone"):
        open_source(path, "train")


@pytest.mark.parametrize("layout", ["ade", "flat"])
def test_images_alone_are_read_whatever_the_label_maps_are(tmp_path, layout):
    path = scene_folder(tmp_path, layout)
    with_maps = [open_source(path, split, holdout=0.4) for split in ("train", "validation", "all")]
    for label_map in (tmp_path / "annotations").rglob("*.png"):
        label_map.unlink()
    (tmp_path / "objectInfo150.txt").write_text("none")
    for source in with_maps:
        split = source.description.split(", ")[1].split(":")[0]
        alone = open_source(path, split, holdout=0.4, images_alone=True)
        assert [alone.name(i) for i in range(len(alone))] == [
            source.name(i) for i in range(len(source))
        ]
        assert alone.mask_classes is None and alone[0] == source[0]
    assert open_source("digits", "test", images_alone=True).mask_classes is None
    for image in (tmp_path / "images").rglob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match="there is no image below .*images"):
        open_source(path, "all", images_alone=True)


def test_classes_are_named_by_the_file_beside_the_images(tmp_path):
    path = scene_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nsea\n\n")
    assert open_source(path, "train").mask_classes == ("sky", "sea")
    info = tmp_path / "objectInfo150.txt"
    info.write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t.1\t3\t4\twall\n2\t.1\t3\t4\tbuilding, edifice"
    )
    before = open_source(path, "train")
    assert before.mask_classes == ("wall", "building, edifice")
    info.write_text("wall\nbuilding")
    with pytest.raises(UserError, match="objectInfo150.txt is not as SceneParse150 has it"):
        open_source(path, "train")
    info.unlink()
    assert open_source(path, "train").fingerprint != before.fingerprint


def test_pre_training_reads_the_images_alone(tmp_path):
    source = open_source(scene_folder(tmp_path), "train")
    views = {"image": View((8, 8), "bicubic")}
    batch = next(train_batches(source, views, FLIP, batch_size=4, seed=0, workers=0))
    assert len(source) == 2 and (batch["label"] == -1).all()
    assert (batch["image"][..., 2] == 7).all()  # as all images have, and no label map


# What a label map says


def test_label_zero_of_ade20k_is_ignored_and_the_others_move_down():
    written = np.array([[0, 1, 150, 255]], np.uint8)
    plain, reduced = Labels(151, False), Labels(150, True)
    np.testing.assert_array_equal(
        reduced.read(LabelMap(png(written), "a"), (1, 4)), [[255, 0, 149, 255]]
    )
    np.testing.assert_array_equal(plain.read(LabelMap(png(written), "a"), (1, 4)), written)
    classes = np.arange(150, dtype=np.uint8)[None]
    for labels in (plain, reduced):
        there = LabelMap(labels.write(classes), "a")
        np.testing.assert_array_equal(labels.read(there, (1, 150)), classes)


def test_label_maps_with_a_palette_are_their_indices():
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    file = io.BytesIO()
    picture.save(file, "png")
    assert picture.mode == "P"
    found = Labels(3, False).read(LabelMap(file.getvalue(), "a"), (2, 2))
    np.testing.assert_array_equal(found, indices)


@pytest.mark.parametrize(
    ("pixels", "reduce_zero", "said"),
    [
        (np.full((4, 4), 5, np.uint8), False, "b.png holds the value 5, .* 5 classes hold 0 to 4"),
        (
            np.full((4, 4), 6, np.uint8),
            True,
            r"the value 6, .* hold 0 \(no class\), 1 to 5 and 255",
        ),
        (np.full((4, 4), 300, np.uint16), False, "the value 300"),
        (np.zeros((4, 4, 3), np.uint8), False, r"b.png is a colour picture \(RGB\)"),
        (np.zeros((4, 5), np.uint8), False, "b.png has 4x5 pixels, its image 4x4"),
    ],
)
def test_wrong_label_maps_are_refused_by_name(pixels, reduce_zero, said):
    with pytest.raises(UserError, match=said):
        Labels(5, reduce_zero).read(LabelMap(png(pixels), "b.png"), (4, 4))


def test_broken_label_maps_are_like_broken_images():
    with pytest.raises(BadImage, match="its label map b.png cannot be read"):
        Labels(5, False).read(LabelMap(png(picture(9, 9)[0])[:80], "b.png"), (9, 9))
    for other in (b"", b"\x93NUMPY\x01\0nothing"):
        with pytest.raises(BadImage, match="b.npy is no image: PNG or TIFF can be read$"):
            Labels(5, False).read(LabelMap(other, "b.npy"), (9, 9))
    sizes = [(16, 20)] * 10
    whole, broken = (
        next(train_batches(Memory(sizes, bad), SCENES, FLIP, batch_size=10, seed=0, workers=0,
                           max_bad_share=0.1))
        for bad in ((), (3,))
    )  # fmt: skip
    changed = (whole["mask"] != broken["mask"]).any((1, 2))
    assert changed.sum() == 1


@pytest.mark.parametrize(
    "options",
    [{"format": "jpeg"}, {"format": "jpeg2000"}, {"format": "tiff", "compression": "jpeg"}],
)
def test_label_maps_whose_numbers_a_photographs_compression_changes_are_refused(options):
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, **options)
    with pytest.raises(UserError, match="the label map b is compressed as a photograph is"):
        Labels(5, False).read(LabelMap(file.getvalue(), "b"), (8, 8))


@pytest.mark.parametrize("labels", [Labels(1, False), Labels(256, False), Labels(255, True)])
def test_numbers_of_classes_that_no_byte_holds_are_refused(labels):
    with pytest.raises(UserError, match="config.segment.classes"):
        labels.check()


# Training


def windows(memory, number=4, **options):
    options = {"batch_size": 8, "seed": 3, "workers": 2, **options}
    iterator = train_batches(memory, SCENES, FLIP, **options)
    batches = list(itertools.islice(iterator, number))
    iterator.close()
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


SIZES = [(20, 30), (24, 17), (16, 16), (15, 40), (31, 31)]


def test_image_and_label_map_are_cut_alike():
    found = windows(Memory(SIZES))
    image, mask = found["image"].astype(int), found["mask"]
    outside = (image == SCENES.fill).all(-1)
    assert 0.02 < outside.mean() < 0.6 and (mask[outside] == 255).all()
    written = np.where(mask == 255, 0, mask + 1)  # red was the label
    np.testing.assert_array_equal(image[..., 0][~outside], written[~outside])
    np.testing.assert_array_equal(image[..., 1][~outside], 255 - written[~outside])


def test_windows_depend_on_seed_and_position_alone():
    whole = windows(Memory(SIZES))
    for options in ({"workers": 0}, {"start": 0, "batch_size": 16, "number": 2}):
        again = windows(Memory(SIZES), **options)
        for key, values in whole.items():
            np.testing.assert_array_equal(again[key], values)
    part = [
        next(train_batches(Memory(SIZES), SCENES, FLIP, batch_size=8, seed=3, workers=0,
                           process_index=i, process_count=2))["mask"]
        for i in (0, 1)
    ]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate(part), whole["mask"][:8])
    assert (windows(Memory(SIZES), seed=4)["mask"] != whole["mask"]).mean() > 0.3


def test_windows_have_the_wanted_sizes_and_both_orientations():
    ramp = np.add.outer(np.zeros(64), np.arange(96)).astype(np.uint8)
    labels, image = ramp, np.repeat(ramp[..., None], 3, axis=-1)
    steps, flips = [], 0
    for position in range(200):
        draws = generator(position, 0).random(scenes.DRAWS)
        window, _ = scenes.random_window(image, labels, SCENES, 0.5, draws)
        row = window[0, :, 0].astype(float)
        row = row[row != SCENES.fill[0]]
        flips += row[0] > row[-1]
        steps.append(abs(np.ptp(row)) / (len(row) - 1))  # original pixels for each of the window
    assert 75 < flips < 125
    ratio = 4 / np.array(steps)  # 64 rows become 16 times the ratio
    assert 0.48 < ratio.min() < 0.53 and 1.9 < ratio.max() < 2.15
    assert abs(ratio.mean() - 1.25) < 0.1


def test_a_class_that_fills_the_window_is_avoided():
    """A small square of class 1 in a large field of 0: most windows do not see it."""
    labels = np.zeros((32, 32), np.uint8)
    labels[2:12, 2:12] = 1
    image = np.zeros((32, 32, 3), np.uint8)
    found = {}
    for most in (1.0, 0.75):
        cut = SCENES._replace(short_side=32, resize=(1.0, 1.0), max_category=most)
        masks = [
            scenes.random_window(image, labels, cut, 0.0, generator(i, 0).random(scenes.DRAWS))[1]
            for i in range(100)
        ]
        found[most] = [np.bincount(mask.ravel(), minlength=2).max() / mask.size for mask in masks]
    assert np.mean(np.array(found[1.0]) > 0.75) > 0.7
    assert np.mean(np.array(found[0.75]) > 0.75) < 0.4


@pytest.mark.parametrize(
    ("labels", "varied"),
    [
        ([[0, 0, 0, 1]], False),  # 0.75 is not below 0.75
        ([[0, 0, 1, 1]], True),
        ([[0, 0, 0, 255]], False),
        ([[0, 0, 1, 255]], True),  # two thirds of what is labelled
        ([[0, 0, 0, 1, 255, 255, 255, 255]], False),
        ([[255, 255]], False),
    ],
)
def test_variety_is_judged_by_what_is_labelled(labels, varied):
    assert scenes.is_varied(np.array(labels, np.uint8), 0.75) == varied


# Evaluation


def evaluated(source, cut=SCENES, **options):
    options = {"batch_size": 4, "workers": 0, "eval_crop": 1.0, **options}
    batches = list(eval_batches(source, cut, **options))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def test_evaluation_shows_every_pixel_of_every_image_once():
    found = evaluated(Memory(SIZES))
    assert found["mask"].shape == (8, 31, 40)
    assert found["image_16"].shape == (8, 23, 43, 3)  # of 24x17 and 15x40
    assert list(found["valid"]) == [True] * 5 + [False] * 3
    for i, (labels, image) in enumerate(Memory(SIZES).pairs):
        height, width = labels.shape
        assert tuple(found["shape"][i]) == (height, width)
        mask = np.where(labels == 0, 255, labels - 1)
        np.testing.assert_array_equal(found["mask"][i, :height, :width], mask)
        assert (found["mask"][i] != 255).sum() == (mask != 255).sum()
        size = tuple(found["size_16"][i])
        assert min(size) == 16 and size == scenes.resized((height, width), 16)
        canvas = found["image_16"][i]
        assert (canvas[size[0] :] == SCENES.fill).all()
        if size == (height, width):
            np.testing.assert_array_equal(canvas[:height, :width], image)
    assert (found["mask"][5:] == 255).all()


def test_views_of_evaluation_have_their_own_canvases():
    found = evaluated(Memory(SIZES), SCENES._replace(sides=(16, 24)))
    assert found["image_24"].shape == (8, 34, 64, 3)
    whole = evaluated(Memory(SIZES), SCENES._replace(sides=(scenes.WHOLE,)))
    assert whole["image_0"].shape == (8, 16, 16, 3)
    assert tuple(whole["size_0"][3]) == (6, 16) and tuple(whole["size_0"][4]) == (16, 16)


def test_very_oblong_images_are_resized_by_their_longer_side():
    assert scenes.resized((100, 800), 16) == (8, 64)
    assert scenes.resized((800, 100), 16) == (64, 8)
    assert scenes.resized((100, 400), 16) == (16, 64)


def test_images_without_label_maps_are_shown_unlabelled():
    source = Memory(SIZES)
    source.mask_classes = None
    found = evaluated(source)
    assert (found["mask"] == 255).all() and found["valid"].sum() == 5
    np.testing.assert_array_equal(found["image_16"], evaluated(Memory(SIZES))["image_16"])


def test_shapes_are_known_before_anything_is_read():
    shapes = eval_shapes(SCENES, 4, 3)
    found = next(eval_batches(Memory([(16, 16)]), SCENES, batch_size=4, eval_crop=1.0, workers=0))
    assert {k: (len(v.shape), v.dtype) for k, v in shapes.items()} == {
        k: (v.ndim, v.dtype) for k, v in found.items()
    }
    assert shapes["image_16"].shape == found["image_16"].shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_sizes_are_those_of_the_decoded_image(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    Image.fromarray(np.zeros((5, 9, 3), np.uint8)).save(file, kind, exif=exif)
    image = file.getvalue()
    assert read_size(image) == decode(image, channels=3, max_value=255).shape[:2]


def test_sizes_of_other_files_and_of_pixels():
    file = io.BytesIO()
    np.save(file, np.zeros((3, 4, 5), np.uint8))
    assert read_size(file.getvalue()) == read_size(np.zeros((3, 4), np.uint8)) == (3, 4)
    with pytest.raises(BadImage):
        read_size(b"\x89PNG\r\n\x1a\nnothing")


# The digits


def test_strokes_of_the_digits_have_their_digits_class():
    source = open_source("digits", "validation")
    assert source.mask_classes == ("background", *"0123456789")
    records = digits()["validation"]
    for i in range(0, len(source), 25):
        image, label, _ = records[i]
        labels = source.mask(i).labels
        assert set(np.unique(labels)) == {0, label + 1}
        assert image[labels > 0].min() > image[labels == 0].max()
    few = FewLabels(open_source("digits", "train"), 2, seed=0)
    assert (
        few.mask_classes == source.mask_classes and few.mask(19).labels.max() == few[19].label + 1
    )


def test_other_sources_have_no_label_maps(tmp_path):
    write(tmp_path, "a/b.png", np.zeros((2, 2), np.uint8))
    assert open_source(f"folder:{tmp_path}", "train").mask_classes is None
