"""Writes what people have as a TFDS data set in ArrayRecord, the format that training reads.

`python -m beit_jax.prepare --help` shows its commands with examples.
"""

import argparse
import collections
import concurrent.futures
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich import progress

from beit_jax import command_line
from beit_jax.data.decode import BadImage, read_pixels
from beit_jax.data.digits import NAME as DIGITS
from beit_jax.data.digits import write_digits
from beit_jax.data.folder import folder_splits
from beit_jax.data.record import Record, Source
from beit_jax.data.tfds_store import dataset_dir, leftovers, write_dataset
from beit_jax.errors import UserError

_EXAMPLES = """examples:
  # ImageNet, unpacked into ~/imagenet/train/n01440764/*.JPEG and ~/imagenet/val/n01440764/*.JPEG
  python -m beit_jax.prepare folder ~/imagenet --name=imagenet2012
  python -m beit_jax.main --config=configs/mim_base.py

  # a folder of one's own, labelled by its sub-folders or not at all; 5 % become validation
  python -m beit_jax.prepare folder ~/pictures --name=pictures --data_dir=/data/tfds
  python -m beit_jax.main --config=configs/mim_base.py \\
      --config.data.source=tfds:pictures --config.data.data_dir=/data/tfds
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> int:
        options = _parser().parse_args(arguments)
        options.run(options)
        return 0

    return command_line.run("beit_jax.prepare", command, "nothing was kept.")


def _parser() -> command_line.Parser:
    description = __doc__.split("\n")[0]
    parser, layout = command_line.make_parser("beit_jax.prepare", description, _EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="digits|folder")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--data_dir",
        default="",
        help="where TFDS data sets lie ($TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )

    text = "scikit-learn's 1,797 handwritten digits"
    digits = commands.add_parser("digits", parents=[shared], help=text, description=text, **layout)
    digits.add_argument("--name", default=DIGITS, help="the data set's name (%(default)s)")
    digits.set_defaults(run=_prepare_digits)

    text = "every image below a folder: train/ and val/ are splits, other sub-folders labels"
    folder = commands.add_parser("folder", parents=[shared], help=text, description=text, **layout)
    folder.add_argument("src", metavar="SRC", help="the folder")
    folder.add_argument("--name", required=True, help="the data set's name, as in tfds:NAME")
    folder.add_argument(
        "--holdout",
        type=float,
        default=0.05,
        help="share of the images that becomes validation where SRC has no val/ (%(default)s)",
    )
    folder.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="threads that check the images (%(default)s)",
    )
    folder.set_defaults(run=_prepare_folder)
    return parser


def _prepare_digits(options: argparse.Namespace) -> None:
    _refuse_taken(options)
    _say_done(write_digits(options.data_dir, options.name), options)


def _prepare_folder(options: argparse.Namespace) -> None:
    _refuse_taken(options)
    if options.workers < 1:
        raise UserError(f"--workers={options.workers} must be at least 1.")
    splits = folder_splits(options.src, options.holdout)
    bad: list[str] = []
    checked = {
        split: _readable_records(source, options.workers, bad, split)
        for split, source in splits.items()
    }
    classes = next(iter(splits.values())).class_names
    total = sum(map(len, splits.values()))
    target = write_dataset(
        options.name,
        options.data_dir,
        checked,
        class_names=classes,
        accept=lambda: _refuse_all_bad(bad, total, options.src),
    )
    if bad:
        listing = target / "bad_files.txt"
        text = "".join(f"{line}\n" for line in bad)
        listing.write_text(text, encoding="utf-8", errors="backslashreplace")
        print(f"{len(bad):,} of {total:,} images cannot be read and were left out; see {listing}")
    _say_done(target, options)


def _readable_records(source: Source, workers: int, bad: list[str], split: str) -> Iterator[Record]:
    """Yields the records whose image decodes, in order; notes the others in `bad`."""

    def read(index: int) -> tuple[Record, str]:
        record = Record(b"", -1, f"{split}, image {index}")
        try:
            record = source[index]
            read_pixels(record.image)
        except (BadImage, OSError) as error:
            return record, " ".join(str(error).split())
        return record, ""

    # A short window of images in flight, so that a data set of any size streams through.
    window: collections.deque[concurrent.futures.Future] = collections.deque()
    columns = (
        progress.TextColumn(split),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        progress.Progress(*columns) as bar,
    ):
        task = bar.add_task(split, total=len(source))
        for index in range(len(source) + 4 * workers):
            if index < len(source):
                window.append(pool.submit(read, index))
            if index >= 4 * workers:
                record, reason = window.popleft().result()
                bar.advance(task)
                if reason:
                    bad.append(f"{record.name}\t{reason}")
                else:
                    yield record


def _refuse_taken(options: argparse.Namespace) -> None:
    target = dataset_dir(options.name, options.data_dir)
    if target.exists():
        raise UserError(
            f"{target} is there already: choose another --name or --data_dir, or delete it first."
        )
    for left in leftovers(options.name, options.data_dir):
        print(f"{left} is of another run; if none is running now, it is left over: delete it.")


def _refuse_all_bad(bad: list[str], total: int, src: str) -> None:
    if len(bad) == total:
        name, reason = bad[0].split("\t")
        raise UserError(
            f"none of the {total:,} images below {src} can be read; the first is {name}: {reason}."
        )


def _say_done(target: Path, options: argparse.Namespace) -> None:
    extra = f" --config.data.data_dir={options.data_dir}" if options.data_dir else ""
    print(f"wrote {target}\nuse it with --config.data.source=tfds:{options.name}{extra}")


if __name__ == "__main__":
    sys.exit(main())
