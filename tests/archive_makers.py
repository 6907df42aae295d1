"""Small archives in the layouts that `beit_jax.prepare` reads, and what it makes of them."""

import io
import json
import struct
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet
import scipy.io
import tensorflow_datasets as tfds
from tensorboardX.record_writer import masked_crc32c

from beit_jax import prepare
from beit_jax.data.sources import open_source

WNIDS = ("n01440764", "n01443537", "n01484850")


def picture(seed: int, size: int = 12, kind: str = ".jpg") -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return cv2.imencode(kind, image)[1].tobytes()


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_imagenet(root: Path, per_class: int = 4, validation: int = 5, devkit: bool = True) -> dict:
    """Writes the official archives; returns {split: [(name, bytes, wnid)]} in their order."""
    root.mkdir(parents=True, exist_ok=True)
    train = [
        (f"{wnid}_{i}.JPEG", picture(100 * c + i), wnid)
        for c, wnid in enumerate(WNIDS)
        for i in range(per_class)
    ]
    inner = {
        f"{wnid}.tar": tar_bytes({name: data for name, data, of in train if of == wnid})
        for wnid in WNIDS
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    ids = {3: WNIDS[0], 1: WNIDS[1], 2: WNIDS[2]}  # ILSVRC's own numbers are in another order
    truth = [1 + i % 3 for i in range(validation)]
    held = [
        (f"ILSVRC2012_val_{i + 1:08d}.JPEG", picture(1000 + i), ids[truth[i]])
        for i in range(validation)
    ]
    files = {name: data for name, data, _ in held[::-1]}  # in no order
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(files))
    if devkit:
        kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
        synsets = np.array([(k, v, f"words of {v}") for k, v in ids.items()], kinds)
        meta = io.BytesIO()
        scipy.io.savemat(meta, {"synsets": synsets})
        folder = "ILSVRC2012_devkit_t12/data"
        text = "".join(f"{number}\n" for number in truth).encode()
        kit = {
            f"{folder}/meta.mat": meta.getvalue(),
            f"{folder}/ILSVRC2012_validation_ground_truth.txt": text,
        }
        (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes(kit, "w:gz"))
    return {"train": train, "validation": held[::-1]}


def tfrecord(examples: list[bytes]) -> bytes:
    """TensorFlow's framing, with checksums of another implementation."""
    rows = []
    for data in examples:
        head = struct.pack("<Q", len(data))
        rows.append(head + struct.pack("<I", masked_crc32c(head)))
        rows.append(data + struct.pack("<I", masked_crc32c(data)))
    return b"".join(rows)


def make_tfrecord(folder: Path, splits: dict[str, list[list[bytes]]], features) -> None:
    """Writes serialised examples, shard by shard, as TFDS's usual files of the data set `old`."""
    folder.mkdir(parents=True)
    infos = []
    for split, shards in splits.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name="old", data_dir=folder, split=split, filetype_suffix="tfrecord"
        )
        for number, examples in enumerate(shards):
            path = template.sharded_filepath(shard_index=number, num_shards=len(shards))
            path.write_bytes(tfrecord(examples))
        lengths = [len(examples) for examples in shards]
        infos.append(tfds.core.SplitInfo(split, lengths, 1, filename_template=template))
    identity = tfds.core.dataset_builder.dataset_info.DatasetIdentity(
        name="old", version=tfds.core.Version("5.1.0"), data_dir=str(folder), module_name="old"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, description="An old one.")
    info.set_file_format(tfds.core.FileFormat.TFRECORD)
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)


def make_parquet(path: Path, images: list, labels: list | None, names=(), group: int = 4) -> None:
    """Writes a table as Hugging Face's `datasets` does; `images` are {"bytes", "path"}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {"image": pyarrow.array(images, kind)}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pyarrow.array(labels, pyarrow.int64())
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = pyarrow.table(columns)
    if names or labels is None:
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def written(data_dir: Path, name: str, split: str) -> list[tuple]:
    """What was written, as (name, bytes, label)."""
    source = open_source(f"tfds:{name}", split, data_dir=str(data_dir))
    return [(one.name, one.image, one.label) for one in (source[i] for i in range(len(source)))]


def run(tmp_path, *arguments) -> int:
    return prepare.main([*map(str, arguments), f"--data_dir={tmp_path / 'tfds'}", "--workers=3"])


def names_of(tmp_path, name: str) -> tuple[str, ...]:
    return open_source(f"tfds:{name}", "train", data_dir=str(tmp_path / "tfds")).class_names


def refused(tmp_path, capsys, words, *arguments) -> None:
    assert run(tmp_path, *arguments) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said
    assert not list((tmp_path / "tfds").glob("*/1.0.0"))


def cut(path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
