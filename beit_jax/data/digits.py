"""scikit-learn's handwritten digits as a TFDS data set: real images with nothing to download."""

import numpy as np

from beit_jax.data.collection import Collection, RecordLayout, records_part
from beit_jax.data.decode import read_pixels
from beit_jax.data.masks import LabelMap
from beit_jax.data.record import Record
from beit_jax.data.tfds_store import TfdsSource, dataset_dir
from beit_jax.data.tfds_writer import Written, write_dataset

NAME = "digits"
SPLITS = {"train": 1097, "validation": 350, "test": 350}  # of 1,797 images
CLASSES = tuple(str(digit) for digit in range(10))
_DESCRIPTION = "scikit-learn's digits: 1,797 handwritten digits of 8x8 pixels, grey values 0 to 16."
_SEED = 0  # of the split; part of the data set, so no setting


INK = 128  # the grey value from which a pixel belongs to a stroke


class Digits(TfdsSource):
    """One split of the digits; a `Source` with label maps: a stroke's pixels are its digit.

    Ink is a matter of brightness; which digit's it is, only the whole stroke tells.
    """

    mask_classes = ("background", *CLASSES)

    def __init__(self, split: str, data_dir: str):
        super().__init__(NAME, split, data_dir)

    def mask(self, index: int) -> LabelMap:
        image, label, name = self[index]
        ink = read_pixels(image).values[..., 0] >= INK
        return LabelMap(np.where(ink, label + 1, 0).astype(np.uint8), name)


def ensure_digits(data_dir: str) -> None:
    """Writes the digits into `data_dir` unless they are there; several processes may do so."""
    if not dataset_dir(NAME, data_dir).exists():
        write_digits(data_dir)


def write_digits(data_dir: str, name: str = NAME) -> Written:
    """Writes the digits as the TFDS data set `name`."""
    layout = RecordLayout(True, CLASSES, channels=1)
    splits = {split: [records_part(split, found, layout)] for split, found in digits().items()}
    return write_dataset(name, data_dir, Collection(splits, layout, _DESCRIPTION))


def digits() -> dict[str, list[Record]]:
    """The three splits, each with the classes in their proportions; pixels uint8 [8, 8].

    Grey values 0 to 16 are spread over 0 to 255.
    """
    from sklearn.datasets import load_digits  # takes a second, which only the first use should pay
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    rest, splits = np.arange(len(images)), {}
    for split in ("test", "validation"):
        rest, chosen = train_test_split(
            rest, test_size=SPLITS[split], stratify=bunch.target[rest], random_state=_SEED
        )
        splits[split] = np.sort(chosen)
    splits["train"] = np.sort(rest)
    return {
        split: [
            Record(images[i], int(bunch.target[i]), f"digit_{i:04d}.png") for i in splits[split]
        ]
        for split in SPLITS
    }
