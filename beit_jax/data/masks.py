"""Label maps: what their pixels say, in files and in the house.

In the house a pixel is its class, 0 to C - 1, or IGNORED. Files are the same, or (ADE20K) hold 0
for whatever belongs to no class and k + 1 for class k. Here, and nowhere else, one becomes the
other.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from beit_jax.data.decode import BadImage
from beit_jax.errors import UserError

IGNORED = 255  # in files too: no class, and neither trained on nor counted
_LOSSY = ("JPEG", "MPO", "JPEG2000")  # Pillow's formats; WebP is always of colours
_NUMBERS = ("1", "L", "P", "I;16", "I")  # Pillow's modes of one number a pixel


class LabelMap(NamedTuple):
    """A label map before decoding."""

    labels: bytes | np.ndarray  # an encoded file, or integers [H, W]
    name: str  # what a person finds it by


class Labels(NamedTuple):
    """How files number the classes."""

    classes: int  # C
    reduce_zero: bool  # whether 0 is no class and class k is k + 1, as in ADE20K

    def check(self) -> None:
        """Raises UserError for more classes than a byte has room for."""
        most = IGNORED - self.reduce_zero
        if not 2 <= self.classes <= most:
            raise UserError(
                f"label maps of {self.classes} classes cannot be read: there must be 2 to {most}; "
                "set config.segment.classes, or correct the list of classes beside the images."
            )

    def read(self, label_map: LabelMap, size: tuple[int, int]) -> np.ndarray:
        """A file's label map in the house's numbers.

        Args:
            label_map: of an image.
            size: that image's height and width.

        Returns:
            uint8 [H, W]: classes, or IGNORED.

        Raises:
            BadImage: the file is broken.
            UserError: it is no label map of such an image, or not of these classes.
        """
        name, values = label_map.name, _decode(label_map)
        if values.shape != tuple(size):
            raise UserError(
                f"the label map {name} has {_by(values.shape)} pixels, its image {_by(size)}: "
                "take the pair that belongs together, in one size."
            )
        last = self.classes - 1 + self.reduce_zero
        wrong = values[((values < 0) | (values > last)) & (values != IGNORED)]
        if wrong.size:
            other = "0 (no class), 1" if self.reduce_zero else "0"
            raise UserError(
                f"the label map {name} holds the value {wrong.max()}, but those of {self.classes} "
                f"classes hold {other} to {last} and {IGNORED} (ignored): correct it, "
                "config.segment.classes or config.segment.reduce_zero_label."
            )
        values = values.astype(np.uint8)
        if self.reduce_zero:
            ignored = (values == 0) | (values == IGNORED)
            values = np.where(ignored, np.uint8(IGNORED), values - np.uint8(1))
        return values

    def write(self, labels: np.ndarray) -> np.ndarray:
        """Classes uint8 [...] as files number them; the inverse of `read`."""
        return labels + np.uint8(self.reduce_zero)


def _decode(label_map: LabelMap) -> np.ndarray:
    """Integers [H, W]; of a picture with a palette its indices, which are the labels."""
    labels, name = label_map
    if isinstance(labels, bytes):
        try:
            picture = Image.open(io.BytesIO(labels))
            mode, labels = picture.mode, np.asarray(picture)
        except UnidentifiedImageError:
            raise BadImage(f"its label map {name} is no image: PNG or TIFF can be read") from None
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's for broken files
            raise BadImage(f"its label map {name} cannot be read ({error})") from None
        if picture.format in _LOSSY or picture.info.get("compression") == "jpeg":
            raise UserError(
                f"the label map {name} is compressed as a photograph is ({picture.format}), which "
                "changes the numbers of its classes: write it as PNG from what it was made of."
            )
        if mode not in _NUMBERS:
            raise UserError(
                f"the label map {name} is a colour picture ({mode}): a label map has one channel, "
                "whose values number the classes; write it so."
            )
    return labels.astype(np.int32)


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
