"""Writes what people have as a TFDS data set in ArrayRecord, the format that training reads.

`python -m beit_jax.prepare --help` shows its commands with examples.
"""

import argparse
import os
import sys
from collections.abc import Callable

from rich import progress

from beit_jax import command_line
from beit_jax.data.archives.imagenet import open_imagenet
from beit_jax.data.archives.tfrecord import open_tfrecord
from beit_jax.data.archives.webdataset import open_webdataset
from beit_jax.data.collection import Collection, from_sources
from beit_jax.data.digits import NAME as DIGITS
from beit_jax.data.digits import write_digits
from beit_jax.data.folder import folder_splits
from beit_jax.data.paths import local_path
from beit_jax.data.scene_folder import is_scene_folder
from beit_jax.data.tfds_store import dataset_dir
from beit_jax.data.tfds_writer import BAD_FILES, Written, interrupted, leftovers, write_dataset
from beit_jax.errors import UserError

_EXAMPLES = """examples:
  # ImageNet: a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar
  python -m beit_jax.prepare imagenet ~/downloads
  python -m beit_jax.main --config=configs/mim_base.py

  # ImageNet, unpacked into ~/imagenet/train/n01440764/*.JPEG and ~/imagenet/val/n01440764/*.JPEG
  python -m beit_jax.prepare folder ~/imagenet --name=imagenet2012

  # a folder of one's own, labelled by its sub-folders or not at all; 5 % become validation
  python -m beit_jax.prepare folder ~/pictures --name=pictures --data_dir=/data/tfds
  python -m beit_jax.main --config=configs/mim_base.py \\
      --config.data.source=tfds:pictures --config.data.data_dir=/data/tfds

  # what TFDS itself prepared as TFRecord; WebDataset shards; Hugging Face parquet
  python -m beit_jax.prepare tfrecord ~/tensorflow_datasets/imagenet2012/5.1.0 --name=imagenet2012
  python -m beit_jax.prepare webdataset '/data/shards/train-{0000..1023}.tar' --name=shards
  python -m beit_jax.prepare parquet ~/imagenet-1k/data --name=imagenet2012

Encoded images are copied as they are. Those that do not decode are left out and listed. A run that
was interrupted goes on behind its last finished shard when the same command is given again.

SRC and --data_dir are folders of this machine. Buckets (gs://) have to be mounted (`gcsfuse
--implicit-dirs BUCKET FOLDER`), since ArrayRecord is written through the file system. What was
written may be copied to a bucket afterwards and be read from a mount of it.
"""


_INTERRUPTED = "the same command, given again, goes on behind the shards that were finished."


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> int:
        options = _parser().parse_args(arguments)
        options.run(options)
        return 0

    return command_line.run("beit_jax.prepare", command, _INTERRUPTED)


def _parser() -> command_line.Parser:
    description = __doc__.split("\n")[0]
    parser, layout = command_line.make_parser("beit_jax.prepare", description, _EXAMPLES)
    names = "digits|folder|imagenet|tfrecord|webdataset|parquet"
    commands = parser.add_subparsers(required=True, metavar=names)

    def add(name: str, text: str, source: str, dataset: str, run) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, **layout)
        if source:
            command.add_argument("src", metavar="SRC", help=source)
        command.add_argument(
            "--name",
            default=dataset,
            required=not dataset,
            help="the data set's name, as in tfds:NAME" + " (%(default)s)" * bool(dataset),
        )
        command.add_argument(
            "--data_dir",
            default="",
            help="where TFDS data sets lie ($TFDS_DATA_DIR or ~/tensorflow_datasets)",
        )
        command.set_defaults(run=run, command=name)
        return command

    def add_reader(name, text, source, read, *flags, dataset="") -> None:
        command = add(name, text, source, dataset, lambda options: _prepare(options, read))
        for flag in ("workers", *flags):
            command.add_argument(f"--{flag}", **_FLAGS[flag])

    add("digits", "scikit-learn's 1,797 handwritten digits", "", DIGITS, _prepare_digits)
    add_reader(
        "folder",
        "every image below a folder: train/ and val/ are splits, other sub-folders labels",
        "the folder",
        _read_folder,
        "holdout",
    )
    add_reader(
        "imagenet",
        "ImageNet's two official tar files, streamed and not unpacked",
        "the folder that holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; labels of the "
        "latter come from ILSVRC2012_devkit_t12.tar.gz where it lies beside, else from TFDS",
        lambda options: open_imagenet(options.src),
        dataset="imagenet2012",
    )
    add_reader(
        "tfrecord",
        "a TFDS data set in its usual TFRecord files, all its features kept",
        "the folder NAME/VERSION that holds its dataset_info.json",
        lambda options: open_tfrecord(options.src),
    )
    add_reader(
        "webdataset",
        "WebDataset tar shards: .jpg, .jpeg, .png or .webp, with .cls or a label in .json or none",
        "the folder of the shards, or a pattern such as '/data/train-{000..146}.tar'; train, "
        "val(idation) and test in the names of files or folders are splits",
        lambda options: open_webdataset(options.src, options.classes, options.holdout),
        "classes",
        "holdout",
    )
    add_reader(
        "parquet",
        "parquet files of Hugging Face's datasets: a column image, and label where there is one",
        "the folder of the files, train-00000-of-00010.parquet and so on, or one file",
        _open_parquet,
        "holdout",
    )
    return parser


_FLAGS = {
    "workers": {
        "type": int,
        "default": os.cpu_count() or 1,
        "help": "threads that read and check the images (%(default)s)",
    },
    "holdout": {
        "type": float,
        "default": 0.05,
        "help": "share of the images that becomes validation where SRC has none (%(default)s)",
    },
    "classes": {
        "default": "",
        "help": "a file with one class name a line (classes.txt beside the shards, if it is there)",
    },
}


def _open_parquet(options: argparse.Namespace) -> Collection:
    from beit_jax.data.archives.parquet import open_parquet  # half a second that others need not

    return open_parquet(options.src, options.holdout)


def _prepare_digits(options: argparse.Namespace) -> None:
    _refuse_taken(options, "")
    _say_done(write_digits(options.data_dir, options.name), options)


def _read_folder(options: argparse.Namespace) -> Collection:
    if is_scene_folder(options.src):
        raise UserError(
            f"{options.src} holds label maps beside its images, which are read where they lie: "
            f"train with --config.data.source=folder:{options.src}."
        )
    return from_sources(folder_splits(options.src, options.holdout))


def _prepare(options: argparse.Namespace, read: Callable[..., Collection]) -> None:
    if options.workers < 1:
        raise UserError(f"--workers={options.workers} must be at least 1.")
    given = {k: str(v) for k, v in vars(options).items() if k not in ("run", "workers", "data_dir")}
    origin = repr(sorted({**given, "src": str(local_path(options.src))}.items()))
    _refuse_taken(options, origin)
    collection = read(options)
    columns = (
        progress.TextColumn("{task.description}: {task.fields[images]:,} images"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as bar:
        rows = {
            split: bar.add_task(split, total=len(parts), images=0)
            for split, parts in collection.splits.items()
        }

        def show(split: str, parts: float, images: int) -> None:
            bar.update(rows[split], completed=parts, images=images)

        written = write_dataset(
            options.name,
            options.data_dir,
            collection,
            origin=origin,
            workers=options.workers,
            show=show,
        )
    _say_done(written, options)


def _refuse_taken(options: argparse.Namespace, origin: str) -> None:
    target = dataset_dir(options.name, options.data_dir)
    if target.exists():
        raise UserError(
            f"{target} is there already: choose another --name or --data_dir, or delete it first."
        )
    for left in leftovers(options.name, options.data_dir, origin):
        print(f"{left} is of another run; if none is running now, it is left over: delete it.")
    if origin and interrupted(options.name, options.data_dir, origin):
        print("going on from what an interrupted run finished, as far as SRC is still the same.")


def _say_done(written: Written, options: argparse.Namespace) -> None:
    if written.bad:
        total = written.bad + sum(written.counts.values())
        print(
            f"{written.bad:,} of {total:,} images cannot be read and were left out; see "
            f"{written.folder / BAD_FILES}"
        )
    counts = ", ".join(f"{count:,} images of {name}" for name, count in written.counts.items())
    extra = f" --config.data.data_dir={options.data_dir}" if options.data_dir else ""
    print(
        f"wrote {written.folder}: {counts}\n"
        f"use it with --config.data.source=tfds:{options.name}{extra}"
    )


if __name__ == "__main__":
    sys.exit(main())
