"""TFDS data sets on disk: find and read them as ArrayRecord, without TensorFlow.

They are found by looking into the data folder and nowhere else: TFDS's own look-up by name may
import a data set's code or ask the network, and its code for `imagenet2012` would look for another
version than the one that `prepare` wrote.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from beit_jax.data.paths import local_path
from beit_jax.data.record import Record
from beit_jax.errors import UserError

VERSION = "1.0.0"  # of what is written here
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def data_root(data_dir: str) -> Path:
    """The folder of all TFDS data sets: `data_dir`, or TFDS's default where it is empty."""
    default = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return local_path(data_dir or default)


class TfdsSource:
    """One split, or slice of one, of a TFDS data set in ArrayRecord; a `Source`."""

    mask_classes = None

    def __init__(self, name: str, split: str, data_dir: str):
        builder = tfds.builder_from_directory(str(find_dataset(name, data_dir)))
        self._features = ImageFeatures.of(builder.info.features, f"tfds:{name}")
        self._split = split
        self._data = _open_split(builder, split, name)
        self.class_names = self._features.class_names
        full = builder.info.full_name
        self.description = (
            f"tfds:{full}, {split}: {len(self._data):,} images, {len(self.class_names)} classes"
        )
        self.fingerprint = f"{full}:{split}:{len(self._data)}"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        return self._features.record(self._data[index], self._place(index))

    def name(self, index: int) -> str:
        try:
            return self[index].name
        except OSError:
            return self._place(index)

    def _place(self, index: int) -> str:
        return f"{self._split}, example {index}"

    def labels(self) -> np.ndarray:
        if not self.class_names:
            return np.full(len(self), -1, np.int32)
        return np.array([self._features.label_of(data) for data in self._data], np.int32)


class ImageFeatures(NamedTuple):
    """What of a TFDS data set's features makes a `Record`."""

    image: str  # its key
    label: str  # its key, "" where there is none
    file_name: str  # its key, "" where there is none
    class_names: tuple[str, ...]
    parsed: tfds.features.FeaturesDict  # those of these keys
    parsed_label: tfds.features.FeaturesDict

    @classmethod
    def of(cls, features: tfds.features.FeaturesDict, where: str) -> "ImageFeatures":
        """Finds them; raises UserError where no feature is the image."""
        image, label, file_name = _feature_keys(features, where)
        keys = [key for key in (image, label, file_name) if key]
        return cls(
            image,
            label,
            file_name,
            tuple(features[label].names) if label else (),
            tfds.features.FeaturesDict({key: features[key] for key in keys}),
            tfds.features.FeaturesDict({key: features[key] for key in keys if key == label}),
        )

    def record(self, data: bytes, name: str) -> Record:
        """A serialised example, its image still encoded; `name` where the example has none."""
        # OpenCV decodes the image later.
        skip = {self.image: tfds.decode.SkipDecoding()}
        example = self.parsed.deserialize_example_np(data, decoders=skip)
        if self.file_name:
            name = example[self.file_name].decode(errors="surrogateescape")
        return Record(example[self.image], int(example[self.label]) if self.label else -1, name)

    def label_of(self, data: bytes) -> int:
        """The label of a serialised example, of which nothing else is parsed."""
        return self.parsed_label.deserialize_example_np(data)[self.label]


def find_dataset(name: str, data_dir: str) -> Path:
    """The folder of NAME[/CONFIG][:VERSION]: the newest in ArrayRecord where none is given.

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
    if version:
        return versions[version]
    # TFDS's own files may lie beside those that `prepare` wrote from them.
    readable = {name for name, path in versions.items() if any(path.glob("*.array_record*"))}
    return versions[max(readable or versions, key=lambda v: tuple(map(int, v.split("."))))]


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
    command = "python -m beit_jax.prepare"
    own = "for your own images pass --config.data.source=folder:PATH"
    if stem == "imagenet2012":
        return (
            f"ImageNet is not prepared (tfds:{stem} is not in {root}): put its two tar files into "
            f"SRC and run `{command} imagenet SRC{where}`, or unpack its images into "
            "SRC/train/CLASS/*.JPEG and SRC/val/CLASS/*.JPEG and run "
            f"`{command} folder SRC --name={stem}{where}`; {own}."
        )
    return (
        f"tfds:{stem} is not prepared in {root}: write it from what you have (`{command} --help`), "
        f"for example a folder of images with `{command} folder SRC --name={stem}{where}`, or with "
        f"TFDS's own `tfds build {stem} --file_format=array_record`; {own}."
    )


def _feature_keys(features, where: str) -> tuple[str, str, str]:
    """Keys of the image, the label and the file's name; "" for those that are not there."""
    images = [key for key, f in features.items() if type(f) is tfds.features.Image]
    labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else ""
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else ""
    if not image:
        raise UserError(
            f"{where} has no feature `image` and not exactly one image feature (it has "
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
            "cannot be read at random: copy it into ArrayRecord with `python -m beit_jax.prepare "
            f"tfrecord {builder.data_dir} --name={builder.name}`."
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


def dataset_dir(name: str, data_dir: str) -> Path:
    """Where a data set is written; raises UserError where the name is none that TFDS takes."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name={name} is no TFDS name: use small letters, digits and _, a letter first."
        )
    return data_root(data_dir) / name / VERSION
