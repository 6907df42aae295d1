"""How fast images come from files."""

import argparse
import contextlib
import io
import itertools
import random
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance
from sklearn import datasets

from beit_jax import reading
from beit_jax.benchmark import timing
from beit_jax.data import decode, geometry, pipeline, sources
from beit_jax.data.geometry import View

BATCH = 32  # images of a turn
PHOTO = (500, 375)  # pixels across and down, ImageNet's most common size


def measure(config: ConfigDict, folder: Path, options: argparse.Namespace) -> dict:
    """Images a second and core: the pipeline, decoding alone, and the official recipe with PIL.

    All three read the same files in one thread. The pipeline brings the encoder's view to the
    device, which makes the tokenizer's of it and jitters colours: that is part of the step's time.
    Also the pipeline with the threads of `data.workers`. Without `data.source` the files are
    JPEGs of scikit-learn's two photographs.
    """
    data = config.data
    if data.source == "digits":
        data.source = f"folder:{_photos(folder / 'photos')}"
    source = sources.open_source(data.source, data.train_split, data_dir=data.data_dir, holdout=0.1)
    view = View(tuple(data.image_size), data.interpolation)

    def batches(workers: int):
        return pipeline.train_batches(
            source,
            {"image": view},
            geometry.Augmentation(tuple(data.crop_scale), tuple(data.crop_ratio), data.flip),
            batch_size=BATCH,
            seed=config.seed,
            channels=data.channels,
            max_value=data.max_value,
            workers=workers,
        )

    order = itertools.cycle(range(len(source)))
    chance = random.Random(0)
    threads = reading.workers(config)
    alone, together = batches(0), batches(threads)
    with contextlib.closing(alone), contextlib.closing(together):
        programs = {
            "pipeline": lambda: jax.block_until_ready(jax.device_put(next(alone))),
            "decode": lambda: [_decode(source[i].image, data) for i in _some(order)],
            "pil": lambda: [official(source[i].image, view, data, chance) for i in _some(order)],
        }
        seconds = timing.in_turns(programs, options.repeats)
        next(together)
        started = time.perf_counter()
        for _ in range(4 * options.repeats):
            jax.block_until_ready(jax.device_put(next(together)))
        threaded = time.perf_counter() - started
    found = {
        f"{name}_images_per_second_and_core": BATCH / statistics.median(values)
        for name, values in seconds.items()
    }
    return {
        "data": source.description,
        **found,
        "times_as_fast_as_pil": timing.ratio(seconds["pil"], seconds["pipeline"]),
        "of_decoding_alone_share": timing.ratio(seconds["decode"], seconds["pipeline"]),
        "images_per_second_on_all_cores": 4 * options.repeats * BATCH / threaded,
        "threads": threads,
    }


def _some(order) -> list[int]:
    return list(itertools.islice(order, BATCH))


def _decode(image: bytes, data) -> np.ndarray:
    return decode.decode(image, channels=data.channels, max_value=data.max_value)


def official(image: bytes, view: View, data, chance: random.Random) -> list[np.ndarray]:
    """What the official loader does with PIL: jitter, flip, one crop resized twice, floats.

    Source: beit/datasets.py, lines 34-66, and beit/transforms.py.
    """
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for enhancer in chance.sample(enhancers, len(enhancers)):
        strength = chance.uniform(1 - data.color_jitter, 1 + data.color_jitter)
        picture = enhancer(picture).enhance(strength)
    if chance.random() < data.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    draws = np.array([chance.random() for _ in range(geometry.DRAWS)])
    top, left, height, width = geometry.random_crop(
        picture.height, picture.width, tuple(data.crop_scale), tuple(data.crop_ratio), draws
    )
    crop = picture.crop((left, top, left + width, top + height))
    mean, std = (np.float32(value) for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = []
    height, width = view.size
    for size, method in (
        ((width, height), geometry.INTERPOLATIONS[view.interpolation]),
        ((width // 2, height // 2), Image.Resampling.LANCZOS),
    ):
        found.append((np.asarray(crop.resize(size, method), np.float32) / 255 - mean) / std)
    return found


def _photos(folder: Path) -> Path:
    """Writes 512 JPEG files of ImageNet's usual size, quality 90."""
    folder.mkdir()
    for number, pixels in enumerate(datasets.load_sample_images().images):
        file = io.BytesIO()
        picture = Image.fromarray(pixels).resize(PHOTO, Image.Resampling.LANCZOS)
        picture.save(file, "jpeg", quality=90)
        for copy in range(256):
            (folder / f"{number}_{copy}.jpg").write_bytes(file.getvalue())
    return folder
