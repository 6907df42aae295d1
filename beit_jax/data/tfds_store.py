"""TFDS data sets on disk: find, read and write them as ArrayRecord, without TensorFlow.

They are found by looking into the data folder and nowhere else: TFDS's own look-up by name may
import a data set's code or ask the network, and its code for `imagenet2012` would look for another
version than the one that `prepare` wrote.
"""

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np
import tensorflow_datasets as tfds

from beit_jax.data.record import Record
from beit_jax.errors import UserError

VERSION = "1.0.0"  # of what is written here
_INCOMPLETE = f"incomplete.{VERSION}_"  # TFDS ignores such names, and so does find_dataset
SHARD_EXAMPLES = 10_000
_WRITE_CHUNK = 1000  # TFDS rewrites the data set's metadata after each chunk
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def data_root(data_dir: str) -> Path:
    """The folder of all TFDS data sets: `data_dir`, or TFDS's default where it is empty."""
    default = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return Path(os.path.expanduser(data_dir or default)).absolute()


class TfdsSource:
    """One split, or slice of one, of a TFDS data set in ArrayRecord; a `Source`."""

    mask_classes = None

    def __init__(self, name: str, split: str, data_dir: str):
        builder = tfds.builder_from_directory(str(find_dataset(name, data_dir)))
        features = builder.info.features
        self._image, self._label, self._file_name = _feature_keys(features, name)
        keys = [key for key in (self._image, self._label, self._file_name) if key]
        self._split = split
        self._data = _open_split(builder, split, name)
        # Only these features are parsed, and the image stays encoded: OpenCV decodes it later.
        self._features = tfds.features.FeaturesDict({key: features[key] for key in keys})
        self._decoders = {self._image: tfds.decode.SkipDecoding()}
        self._only_label = tfds.features.FeaturesDict(
            {key: features[key] for key in keys if key == self._label}
        )
        self.class_names = tuple(features[self._label].names) if self._label else ()
        full = builder.info.full_name
        self.description = (
            f"tfds:{full}, {split}: {len(self._data):,} images, {len(self.class_names)} classes"
        )
        self.fingerprint = f"{full}:{split}:{len(self._data)}"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        example = self._features.deserialize_example_np(self._data[index], decoders=self._decoders)
        label = int(example[self._label]) if self._label else -1
        name = f"{self._split}, example {index}"
        if self._file_name:
            name = example[self._file_name].decode(errors="surrogateescape")
        return Record(example[self._image], label, name)

    def name(self, index: int) -> str:
        return self[index].name

    def labels(self) -> np.ndarray:
        if not self._label:
            return np.full(len(self), -1, np.int32)
        parse = self._only_label.deserialize_example_np
        return np.array([parse(data)[self._label] for data in self._data], np.int32)


def find_dataset(name: str, data_dir: str) -> Path:
    """The folder of NAME[/CONFIG][:VERSION]: the newest version where none is given.

    Raises:
        UserError: nothing is prepared under this name, or more than one config.
    """
    stem, _, version = name.partition(":")
    root = data_root(data_dir)
    if not stem or not all(stem.split("/")) or ".." in stem:
        raise UserError(f"tfds:{name} is no TFDS name; it is tfds:NAME[/CONFIG][:VERSION].")
    versions = _versions(root / stem)
    if not versions and "/" not in stem and (root / stem).is_dir():
        configs = [entry for entry in sorted((root / stem).iterdir()) if _versions(entry)]
        if len(configs) > 1:
            raise UserError(
                f"tfds:{name} has several configs in {root}: choose one of "
                + ", ".join(f"tfds:{stem}/{config.name}" for config in configs)
                + "."
            )
        versions = _versions(configs[0]) if configs else {}
    if version and versions and version not in versions:
        raise UserError(
            f"tfds:{name} is not prepared in {root}, but version {', '.join(versions)} is: name "
            "it, or leave the version out."
        )
    if not versions:
        raise UserError(_how_to_prepare(stem, root, data_dir))
    newest = max(versions, key=lambda v: tuple(map(int, v.split("."))))
    return versions[version or newest]


def _versions(folder: Path) -> dict[str, Path]:
    """Complete versions; a data set that is still written lies under another kind of name."""
    if not folder.is_dir():
        return {}
    return {
        entry.name: entry
        for entry in sorted(folder.iterdir())
        if _VERSION.fullmatch(entry.name) and (entry / "dataset_info.json").exists()
    }


def _how_to_prepare(stem: str, root: Path, data_dir: str) -> str:
    where = f" --data_dir={root}" if data_dir else ""
    command = f"python -m beit_jax.prepare folder SRC --name={stem}{where}"
    own = "for your own images pass --config.data.source=folder:PATH"
    if stem == "imagenet2012":
        return (
            f"ImageNet is not prepared (tfds:{stem} is not in {root}): unpack its images into "
            f"SRC/train/CLASS/*.JPEG and SRC/val/CLASS/*.JPEG and run `{command}`; {own}."
        )
    return (
        f"tfds:{stem} is not prepared in {root}: write it from a folder of images with "
        f"`{command}`, or with TFDS's own `tfds build {stem} --file_format=array_record`; {own}."
    )


def _feature_keys(features, name: str) -> tuple[str, str, str]:
    """Keys of the image, the label and the file's name; "" for those that are not there."""
    images = [key for key, f in features.items() if type(f) is tfds.features.Image]
    labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else ""
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else ""
    if not image:
        raise UserError(
            f"tfds:{name} has no feature `image` and not exactly one image feature (it has "
            f"{', '.join(features)}): choose another data set or use folder:PATH."
        )
    texts = ("file_name", "filename", "image/filename")
    return image, label, next((t for t in texts if t in features and t != image), "")


def _open_split(builder, split: str, name: str):
    """The serialised examples of a split, with random access."""
    formats = {form.value for form in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"tfds:{name} is stored as {', '.join(sorted(formats))} in {builder.data_dir}, which "
            "cannot be read at random: prepare it as ArrayRecord with TFDS's own `tfds build "
            f"{name} --file_format=array_record`, or from a folder of images with `python -m "
            "beit_jax.prepare folder SRC --name=NAME`."
        )
    try:
        examples = builder.info.splits[split].num_examples
    except (KeyError, ValueError, AssertionError):
        raise UserError(
            f"tfds:{name} has no split {split!r}: it has {', '.join(builder.info.splits)}, and "
            "slices of them such as train[99%:]."
        ) from None
    if not examples:
        raise UserError(f"the split {split!r} of tfds:{name} is empty: choose a larger slice.")
    return builder.as_data_source(
        split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
    )


def write_dataset(
    name: str,
    data_dir: str,
    splits: Mapping[str, Iterable[Record]],
    *,
    class_names: tuple[str, ...] = (),
    channels: int | None = 3,
    description: str = "",
    accept: Callable[[], None] = lambda: None,
) -> Path:
    """Writes records as the TFDS data set `name`, all or nothing, and returns its folder.

    Features: `image` (encoded bytes as they are; arrays as PNG), `file_name`, and `label` where
    there are class names. It is written beside its place and renamed when complete, so that
    a killed run leaves nothing that reads as a data set, and of several processes that write the
    same one the first to finish wins and the others' work is dropped. `accept` is called before
    the renaming and may raise to keep it from happening.

    Raises:
        UserError: the name is none that TFDS takes, or nothing can be written there.
    """
    target = dataset_dir(name, data_dir)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_INCOMPLETE, dir=target.parent))
        work.chmod(0o755)
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written ({error.strerror}): choose a folder for TFDS data "
            "sets by config.data.data_dir, by --data_dir of beit_jax.prepare or by $TFDS_DATA_DIR."
        ) from None
    try:
        _write_splits(name, work, splits, class_names, channels, description)
        accept()
        try:
            work.rename(target)
        except OSError:
            if not _versions(target.parent).get(VERSION):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def leftovers(name: str, data_dir: str) -> list[Path]:
    """What killed writers of the data set left, or what is being written now."""
    return sorted(dataset_dir(name, data_dir).parent.glob(f"{_INCOMPLETE}*"))


def dataset_dir(name: str, data_dir: str) -> Path:
    """Where `write_dataset` puts the data set; raises UserError where the name is none."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name={name} is no TFDS name: use small letters, digits and _, a letter first."
        )
    return data_root(data_dir) / name / VERSION


def _write_splits(name, folder, splits, class_names, channels, description) -> None:
    features = {
        "image": tfds.features.Image(shape=(None, None, channels)),
        "file_name": tfds.features.Text(),
    }
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=list(class_names))
    identity = tfds.core.dataset_builder.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict(features),
        description=description or f"Written by beit_jax from {name}.",
    )
    writer = tfds.core.SequentialWriter(info, SHARD_EXAMPLES, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, records in splits.items():
        examples = (_example(record, bool(class_names)) for record in records)
        while chunk := list(itertools.islice(examples, _WRITE_CHUNK)):
            writer.add_examples({split: chunk})
    writer.close_all()


def _example(record: Record, labelled: bool) -> dict:
    image = record.image
    if isinstance(image, np.ndarray):
        colour = image.ndim == 3 and image.shape[2] == 3
        image = cv2.imencode(".png", image[..., ::-1] if colour else image)[1].tobytes()
    example = {"image": image, "file_name": record.name.encode(errors="surrogateescape")}
    return {**example, "label": record.label} if labelled else example
