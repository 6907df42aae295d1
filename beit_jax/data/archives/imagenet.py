"""ImageNet (ILSVRC 2012) from its two official tar files.

ILSVRC2012_img_train.tar holds one tar file for each class, WNID.tar; ILSVRC2012_img_val.tar holds
the validation images in one heap. What these show is in the development kit,
ILSVRC2012_devkit_t12.tar.gz; where it does not lie beside, TFDS's own list of the same is taken.
The result has the features of TFDS's `imagenet2012`, with the classes in the order of their WNIDs.
"""

import functools
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import scipy.io
import tensorflow_datasets as tfds

from beit_jax.data.archives import tar
from beit_jax.data.collection import Collection, Item, Part, RecordLayout, file_stamp
from beit_jax.data.paths import local_path
from beit_jax.data.record import Record
from beit_jax.errors import UserError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_MAX_LIST = 1 << 24  # bytes of a file of the development kit
_NUMBER = re.compile(r"ILSVRC2012_val_(\d+)\.JPEG")


def open_imagenet(path: str) -> Collection:
    """The two tar files in a folder.

    Raises:
        UserError: one is missing or damaged, or they do not fit together.
    """
    root = local_path(path)
    for name in (TRAIN, VALIDATION):
        if not (root / name).is_file():
            raise UserError(
                f"{root / name} is missing: fetch it from https://image-net.org/download-images "
                f"(after registering) into {root}, or use `prepare folder` for unpacked images."
            )
    archives = [
        member for member in tar.members(root / TRAIN) if Path(member.name).suffix == ".tar"
    ]
    classes = tuple(sorted({Path(member.name).stem for member in archives}))
    if not classes or len(classes) < len(archives):
        raise UserError(f"{root / TRAIN} holds no tar files of classes, each once: fetch it again.")
    layout = RecordLayout(True, classes, encoding="jpeg")
    splits = {
        "train": [_class_part(archive, layout) for archive in archives],
        "validation": [_validation_part(root, layout)],
    }
    return Collection(splits, layout, "ImageNet (ILSVRC 2012), from its official tar files.")


def _class_part(archive: tar.Member, layout: RecordLayout) -> Part:
    label = layout.class_names.index(Path(archive.name).stem)

    def items() -> Iterator[Item]:
        for member in tar.members(archive.path, archive):
            yield layout.item(member.name, functools.partial(_record, member, label))

    return Part(
        f"{archive.name!r} in {archive.path}", f"{file_stamp(archive.path)}:{archive}", items
    )


def _validation_part(root: Path, layout: RecordLayout) -> Part:
    path, labels = root / VALIDATION, _validation_labels(root, layout.class_names)

    def items() -> Iterator[Item]:
        for member in tar.members(path):
            number = _NUMBER.fullmatch(Path(member.name).name)
            if not number or not 1 <= int(number[1]) <= len(labels):
                raise UserError(
                    f"{path} holds {member.name!r}, and names there are ILSVRC2012_val_NUMBER.JPEG "
                    f"with numbers from 1 to {len(labels)}: fetch it again."
                )
            label = labels[int(number[1]) - 1]
            yield layout.item(member.name, functools.partial(_record, member, label))

    return Part(str(path), f"{file_stamp(path)}:{labels}", items, len(labels))


def _record(member: tar.Member, label: int) -> Record:
    return Record(member.read(), label, member.name)


def _validation_labels(root: Path, classes: tuple[str, ...]) -> list[int]:
    """Labels of the validation images by their numbers, which start from 1."""
    if (root / DEVKIT).exists():
        source, wnids = root / DEVKIT, _devkit_wnids(root / DEVKIT)
    else:
        source = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt"))
        wnids = source.read_text().split()
    number = {wnid: label for label, wnid in enumerate(classes)}
    if unknown := sorted(set(wnids) - set(number)):
        raise UserError(
            f"validation images are of class {unknown[0]} by {source}, which {root / TRAIN} lacks: "
            f"fetch it again, or {DEVKIT} that belongs to it."
        )
    return [number[wnid] for wnid in wnids]


def _devkit_wnids(path: Path) -> list[str]:
    """WNIDs of the validation images by their numbers, from the development kit."""
    try:
        found = {}
        with tarfile.open(path, "r|gz") as archive:
            for info in archive:
                name = Path(info.name).name
                if info.isreg() and name in (_TRUTH, _META) and info.size <= _MAX_LIST:
                    found[name] = archive.extractfile(info).read()
        synsets = scipy.io.loadmat(io.BytesIO(found[_META]), squeeze_me=True)["synsets"]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return [wnids[int(number)] for number in found[_TRUTH].split()]
    except Exception as error:  # three parsers, each of which fails in many ways
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): fetch it again, or move it "
            "away to use the list that TFDS has."
        ) from None
