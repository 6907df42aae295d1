"""Parquet files of Hugging Face's `datasets`: a column of image files, and one of labels.

The image is a struct {bytes, path}. Class names lie in the schema's metadata, under `huggingface`.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from beit_jax.data.collection import (
    Collection,
    Item,
    Part,
    RecordLayout,
    check_class_names,
    file_stamp,
    files_by_split,
    held_out,
    limited,
)
from beit_jax.data.decode import BadImage
from beit_jax.data.paths import local_path
from beit_jax.data.record import Record
from beit_jax.errors import UserError

_ROWS = 16  # read at a time: images may be large


class _Columns(NamedTuple):
    """What of a table is read."""

    image: str
    label: str  # "" where there is none
    class_names: tuple[str, ...]


def open_parquet(path: str, holdout: float) -> Collection:
    """All parquet files below a folder, or one file.

    Args:
        holdout: share of the images that becomes validation where no file is.

    Raises:
        UserError: there is none, one is damaged, or they have no images or differ in columns.
    """
    root = local_path(path)
    files = [root] if root.is_file() else sorted(root.glob("**/*.parquet"))
    if not files:
        raise UserError(f"there is no .parquet file below {root}: name the folder that holds them.")
    root = root.parent if root.is_file() else root
    columns = _columns(files[0])
    layout = RecordLayout(bool(columns.label), columns.class_names)
    parts = {
        split: [part for file in found for part in _parts(file, columns, layout)]
        for split, found in files_by_split(root, files).items()
    }
    return Collection(held_out(parts, holdout), layout)


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:100]
    return UserError(f"{path} is no parquet file, or is damaged ({reason}): fetch it again.")


def _columns(path: Path) -> _Columns:
    with _open(path) as file:
        schema = file.schema_arrow
    images = [field.name for field in schema if _holds_images(field.type)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else ""
    if not image:
        raise UserError(
            f"{path} has no column `image` and not exactly one of images, which are structs of "
            f"bytes and path (it has {', '.join(schema.names)}): name another folder."
        )
    names = _class_names(schema, path)
    numbers = [field.name for field in schema if pyarrow.types.is_integer(field.type)]
    labels = [name for name in numbers if name in names]
    label = "label" if "label" in numbers else labels[0] if len(labels) == 1 else ""
    return _Columns(image, label, check_class_names(names.get(label, ()), str(path)))


def _holds_images(kind: pyarrow.DataType) -> bool:
    if not pyarrow.types.is_struct(kind):
        return False
    fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    return "bytes" in fields and any(check(fields["bytes"]) for check in binary)


def _class_names(schema: pyarrow.Schema, path: Path) -> dict[str, list[str]]:
    """Class names of each column that has some."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(text).get("info", {}).get("features", {})
        return {
            name: [str(one) for one in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (ValueError, AttributeError, RecursionError):
        raise UserError(
            f"the metadata `huggingface` of {path} cannot be read: fetch the file again."
        ) from None


def _parts(path: Path, columns: _Columns, layout: RecordLayout) -> list[Part]:
    """One part for each of its row groups."""
    if (found := _columns(path)) != columns:
        raise UserError(
            f"{path} has other columns or class names ({found.image}, {found.label or 'no label'}) "
            "than the first file there: prepare each kind of file by itself."
        )
    with _open(path) as file:
        lengths = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    stamp, starts = file_stamp(path), [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        Part(
            f"{path}, row group {group}",
            f"{stamp}:{group}",
            functools.partial(_items, path, group, start, columns, layout),
            length,
        )
        for group, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def _items(
    path: Path, group: int, start: int, columns: _Columns, layout: RecordLayout
) -> Iterator[Item]:
    """The rows of a row group, which is the rows of the file from `start` on."""
    row = start
    wanted = [name for name in (columns.image, columns.label) if name]
    with _open(path) as file:
        try:
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted):
                images = batch.column(columns.image)
                labels = batch.column(columns.label).to_pylist() if columns.label else []
                for i in range(len(batch)):
                    label = labels[i] if labels and labels[i] is not None else -1
                    name = f"{path.name}, row {row}"
                    yield layout.item(name, functools.partial(_record, images[i], label, name))
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from None


def _record(image: pyarrow.StructScalar, label: int, name: str) -> Record:
    if not image.is_valid or not image["bytes"].is_valid:
        raise BadImage("its bytes are not in the table")
    data = image["bytes"].as_buffer()
    limited(data.size)
    path = image["path"].as_py() if "path" in image else None
    return Record(data.to_pybytes(), label, path or name)
