"""The batches of a run: what `config.data` says of source, views and workers, in one place."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax

from beit_jax import sharding
from beit_jax.data import pipeline, sources
from beit_jax.data.record import Source


def open_split(config, split: str, *, images_alone: bool = False) -> Source:
    """A split of `config.data.source`."""
    data = config.data
    return sources.open_source(
        data.source,
        split,
        data_dir=data.data_dir,
        holdout=data.holdout,
        images_alone=images_alone,
    )


def train_batches(source: Source, views, config, folder: Path, mesh, start: int) -> Iterator:
    """Endless global batches on the devices, from batch number `start`."""
    data = config.data
    batches = pipeline.train_batches(
        source,
        views,
        pipeline.Augmentation(
            tuple(data.crop_scale),
            tuple(data.crop_ratio),
            data.flip,
            data.rand_augment,
            tuple(config.model.mean),
        ),
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=start,
        **_reading(config, folder),
    )
    return (sharding.put_batch(batch, mesh) for batch in batches)


def eval_batches(source: Source, views, config, folder: Path, mesh) -> Iterator:
    """Every example of a source once, padded to whole batches, on the devices."""
    batches = pipeline.eval_batches(
        source,
        views,
        batch_size=eval_batch_size(config, mesh),
        eval_crop=config.data.eval_crop,
        **_reading(config, folder),
    )
    return (sharding.put_batch(batch, mesh) for batch in batches)


def eval_batch_size(config, mesh) -> int:
    """`config.eval.batch_size`, rounded up to a multiple of the devices; padding is free."""
    return -(-config.eval.batch_size // mesh.size) * mesh.size


_MOST_WORKERS = 16  # by default; each holds Python's lock for about a quarter of its time


def workers(config) -> int:
    """Threads that read: `config.data.workers`, of which -1 is one for each core.

    On two cores 16 threads read a third fewer images than two: a thread that is put aside while it
    holds Python's lock lets all others wait.
    """
    if config.data.workers >= 0:
        return config.data.workers
    affinity = getattr(os, "sched_getaffinity", None)  # what a job may use of its machine; on Linux
    return min(len(affinity(0)) if affinity else os.cpu_count() or 1, _MOST_WORKERS)


def _reading(config, folder: Path) -> dict:
    data = config.data
    return dict(
        channels=data.channels,
        max_value=data.max_value,
        workers=workers(config),
        max_bad_share=data.max_bad_share,
        bad_files=folder / "bad_files.txt",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
