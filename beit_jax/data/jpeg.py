"""JPEG files: their size at once, and their first rows without the work of the others.

A crop for training ends, on average, well above an image's last row, and libjpeg-turbo stops after
as many rows as a file's head announces: a smaller number there saves decoding the rest.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg

START = b"\xff\xd8\xff"
_END = b"\xff\xd9"
# Codes of a frame's head: SOF0 to SOF15, between which three mean tables and extensions.
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Rows below those wanted: their colours are smoothed with the next one's, and blocks are 8 or 16
# rows high.
_MARGIN = 16


class Head(NamedTuple):
    """What a file announces."""

    height: int  # pixels, as stored
    width: int
    colours: str  # "YCbCr" in nearly all files


def read_head(data: bytes) -> Head:
    """The head of a file; raises ValueError where it is broken."""
    try:
        return Head(*simplejpeg.decode_jpeg_header(data, strict=False)[:3])
    except KeyError:  # colours that simplejpeg has no name for
        raise ValueError("its colours are unknown") from None


def is_plain(data: bytes, head: Head) -> bool:
    """Whether `first_rows` may stand in for a whole decoder.

    Not for other colours, an image that its EXIF tags may turn, and a file that is cut short, which
    a decoder of all rows notices.
    """
    return head.colours == "YCbCr" and b"Exif\0" not in data and data.endswith(_END)


def first_rows(data: bytes, head: Head, rows: int) -> np.ndarray:
    """The first `rows` rows of a plain file: RGB uint8 [rows, W, 3], as all rows would give them.

    Raises ValueError where it cannot be decoded.
    """
    if rows + _MARGIN < head.height:
        place = _height_place(data)
        data = data[:place] + (rows + _MARGIN).to_bytes(2, "big") + data[place + 2 :]
    # Not strict, since data go on after the last row. Else as OpenCV decodes.
    image = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=False)
    return image[:rows]


def _height_place(data: bytes) -> int:
    """Where the frame's head says, in two bytes, how many rows there are."""
    place = 2  # after the file's own marker
    while data[place : place + 1] == b"\xff":
        if data[place + 1] in _FRAMES:
            return place + 5
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise ValueError("its head is broken")
