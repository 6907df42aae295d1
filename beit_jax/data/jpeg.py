"""JPEG files: their size at once, and their first rows without the work of the others.

A crop for training ends, on average, well above an image's last row, and libjpeg-turbo stops after
as many rows as a file's head announces: a smaller number there saves decoding the rest.
"""

import numpy as np
import simplejpeg

START = b"\xff\xd8\xff"
_END = b"\xff\xd9"
# Codes of markers: frames whose rows are coded one after the other (SOF0, SOF1), metadata, a scan.
_SEQUENTIAL, _APP1, _SCAN = (0xC0, 0xC1), 0xE1, 0xDA
_WHOLE = b"\x00\x3f\x00"  # how a scan's head ends that has all of each block
# Rows below those wanted: their colours are smoothed with the next one's, and blocks are 8 or 16
# rows high.
_MARGIN = 16


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, as stored; raises ValueError where the head is broken."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError:  # colours that simplejpeg has no name for
        raise ValueError("its colours are unknown") from None
    return height, width


def first_rows(data: bytes, rows: int) -> np.ndarray | None:
    """The first `rows` rows: RGB uint8 [rows, W, 3], as all rows would give them.

    None where only a decoder of the whole can say: of other colours than YCbCr, of rows that are
    not coded one after the other (progressive files), of an image that its EXIF tags may turn, of a
    file that is cut short or odd in another way.
    """
    place = _rows_place(data)
    if place is None or not data.endswith(_END):
        return None
    # Warnings are errors here. (With strict=False simplejpeg takes, after a warning, an error for
    # one too, and rows stay what lay in memory.)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (KeyError, ValueError):
        return None
    if colours != "YCbCr":
        return None
    if rows + _MARGIN < height:
        height = rows + _MARGIN
        data = data[:place] + height.to_bytes(2, "big") + data[place + 2 :]
    image = np.empty((height, width, 3), np.uint8)
    try:  # as OpenCV decodes
        simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=image)
    except ValueError as error:
        # The head is sound; that data go on after the last row is what may be said, and no more.
        if "extraneous bytes before marker" not in str(error):
            return None
    return image[:rows]


def _rows_place(data: bytes) -> int | None:
    """Where the head says, in two bytes, how many rows there are; None where they cannot be cut."""
    place, found = len(START) - 1, None
    while data[place : place + 1] == b"\xff" and place + 14 < len(data):
        code = data[place + 1]
        if code == _SCAN:
            together = data[place + 4] == 3  # all colours in this scan, which is the only one
            return found if together and data[place + 11 : place + 14] == _WHOLE else None
        if code == _APP1 and data.startswith(b"Exif", place + 4):
            return None
        if code in _SEQUENTIAL:
            found = place + 5
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
