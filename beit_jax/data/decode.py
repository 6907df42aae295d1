"""One image file to pixels, as a person would see it.

OpenCV decodes, because it releases Python's lock, so that threads decode in parallel. EXIF
orientation is applied, palettes are expanded, CMYK becomes RGB, of an animation the first frame is
taken. Transparent pixels are laid over white, as viewers show them (dropping the alpha channel
would bring up whatever colour hides below it). Colour profiles are ignored.
16-bit pixels become 8-bit by one fixed maximum, never by an image's own range, so that the same
measurement is the same grey in every image.
"""

import contextlib
import functools
import io
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import Image

from beit_jax.data import jpeg

cv2.setNumThreads(1)  # one image per thread: the pipeline's threads are the parallelism
# What cannot be read is reported by name, once, by the pipeline.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .ppm .pgm .npy".split()
)  # files that a folder source takes for images

_TURNS = {  # EXIF orientation -> the operation that undoes it; 1 is upright
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}
# Of one image, as Pillow has it; 0.5 GB in RGB. A file of a few kB can claim to be any size.
MAX_PIXELS = 178_956_970
_HEADED = (jpeg.START, b"\x89PNG\r\n")  # of which the size is told at once: JPEG, PNG
_ORIENTATION = 274  # the tag's number, in EXIF and in TIFF

# An image's height and width -> a box's top, left, height and width, all in pixels.
BoxOf = Callable[[int, int], tuple[int, int, int, int]]


class BadImage(Exception):
    """This image cannot be used; the message is the reason, without the image's name."""


class Pixels(NamedTuple):
    """A decoded image: RGB order, upright, uint8 or uint16 [H, W, ch]."""

    values: np.ndarray
    alpha: bool = False  # whether the last of 4 channels is opacity


def decode(
    image: bytes | np.ndarray, *, channels: int, max_value: int, box_of: BoxOf | None = None
) -> np.ndarray:
    """Decodes one image, or a box of it, to uint8 [H, W, channels].

    Args:
        image: an encoded file (JPEG, PNG, WebP, BMP, TIFF, GIF, PNM or NumPy's .npy), or pixels
            uint8 or uint16 [H, W] or [H, W, ch].
        channels: wanted. 3 takes grey (repeated), RGB and RGBA; 1 takes the same by luma; every
            other number, and every other image, must agree.
        max_value: the value of a 16-bit image that becomes 255; larger ones become 255 too.
        box_of: a pure function from the image's size to the box; None takes all. Of most JPEG files
            the rows below the box are not decoded.

    Raises:
        BadImage: it cannot be decoded, or its channels do not fit.
    """
    if box_of is not None and channels == 3:
        crop = _jpeg_crop(image, box_of)
        if crop is not None:
            return crop
    values, alpha = read_pixels(image)
    if values.dtype == np.uint16:
        values = _scale_table(max_value)[values]
    values = np.ascontiguousarray(_to_channels(values, alpha, channels))
    if box_of is None:
        return values
    top, left, height, width = box_of(*values.shape[:2])
    return values[top : top + height, left : left + width]


def _jpeg_crop(image: bytes | np.ndarray, box_of: BoxOf) -> np.ndarray | None:
    """The box of a JPEG file from its first rows; None where that is not for them to say."""
    if isinstance(image, np.ndarray) or not image.startswith(jpeg.START):
        return None
    try:
        image_width, image_height = _claimed_size(image)
    except (BadImage, ValueError):  # as the decoder of the whole will say
        return None
    top, left, height, width = box_of(image_height, image_width)
    rows = jpeg.first_rows(image, top + height)
    return None if rows is None else rows[top:, left : left + width]


def read_pixels(image: bytes | np.ndarray) -> Pixels:
    """Reads an image with the channels and the depth that it has; raises BadImage."""
    pixels = _from_array(image) if isinstance(image, np.ndarray) else _from_bytes(image)
    if pixels.values.size == 0:
        raise BadImage("it has no pixels")
    if pixels.values.dtype not in (np.uint8, np.uint16):
        raise BadImage(f"its pixels are {pixels.values.dtype}; uint8 and uint16 can be read")
    return pixels


def read_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width that `decode` will give an image; most files need not be decoded for it."""
    if not isinstance(image, np.ndarray) and image.startswith(_HEADED):
        try:
            width, height = _claimed_size(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImage(f"its head is broken ({error})") from None
        upright = _exif_orientation(image) <= 4  # the others lie on their side
        return (height, width) if upright else (width, height)
    return read_pixels(image).values.shape[:2]


def _claimed_size(data: bytes) -> tuple[int, int]:
    """Width and height in a file's head; raises BadImage where they are too large.

    A head that is broken raises OSError or, of a JPEG file, ValueError.
    """
    if data.startswith(jpeg.START):
        height, width = jpeg.read_size(data)
        return _check_size(width, height)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return _check_size(*picture.size)
    except Image.DecompressionBombError as error:
        raise BadImage(f"it is too large ({error})") from None


def _check_size(width: int, height: int) -> tuple[int, int]:
    if width * height > MAX_PIXELS:
        raise BadImage(f"it has {width:,} x {height:,} pixels; up to {MAX_PIXELS:,} can be read")
    return width, height


def _from_bytes(data: bytes) -> Pixels:
    if data[:6] == b"\x93NUMPY":
        return _from_array(_npy(data))
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(data)
    with contextlib.suppress(OSError, SyntaxError, ValueError):  # OpenCV may read it all the same
        _claimed_size(data)
    if data.startswith(jpeg.START):  # always 3 channels: OpenCV turns and converts
        return Pixels(_opencv(data, cv2.IMREAD_COLOR_RGB))
    pixels = _from_opencv(_opencv(data, cv2.IMREAD_UNCHANGED))
    if b"eXIf" in data or b"EXIF" in data:  # PNG's and WebP's chunk; this flag does not turn them
        pixels = pixels._replace(values=_turn(pixels.values, _exif_orientation(data)))
    return pixels


def _opencv(data: bytes, flag: int) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
    except cv2.error as error:
        raise BadImage(f"it cannot be decoded ({error.err})") from None
    if image is None:
        raise BadImage("it is empty" if not data else "it is broken or no image that can be read")
    return image


def _from_opencv(image: np.ndarray) -> Pixels:
    """OpenCV's grey [H, W], BGR or BGRA to ours."""
    if image.ndim == 2:
        return Pixels(image[..., None])
    if image.shape[2] == 4:
        return Pixels(cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA), alpha=True)
    return Pixels(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def _tiff(data: bytes) -> Pixels:
    """The first page; without OpenCV where samples beyond grey and RGB would be lost in it."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            _check_size(page.imagewidth, page.imagelength)
            plain = page.samplesperpixel in (1, 3) or page.photometric.name == "SEPARATED"
            if not plain:
                return _tiff_samples(page, data)
    except BadImage:
        raise
    except Exception as error:  # a parser of a format this wide fails in many ways
        raise BadImage(f"it is a TIFF file that cannot be read ({error})") from None
    pixels = _from_opencv(_opencv(data, cv2.IMREAD_UNCHANGED))
    if page.photometric.name == "SEPARATED":  # CMYK: OpenCV adds an opaque alpha
        return Pixels(pixels.values[..., :3])
    return pixels


def _tiff_samples(page: tifffile.TiffPage, data: bytes) -> Pixels:
    alpha = bool(page.extrasamples) and page.extrasamples[-1].name.endswith("ALPHA")
    alpha = alpha and page.samplesperpixel in (2, 4)
    try:
        values = page.asarray()
    except ValueError:  # a compression that tifffile leaves to another package
        if not alpha:
            raise
        values = np.asarray(Image.open(io.BytesIO(data)))
    if page.planarconfig.name == "SEPARATE":
        values = np.moveaxis(values, 0, -1)
    if alpha and values.shape[-1] == 2:  # grey with alpha
        values = values[..., [0, 0, 0, 1]]
    tag = page.tags.get(_ORIENTATION)
    return Pixels(_turn(values, tag.value if tag else 1), alpha)


def _npy(data: bytes) -> np.ndarray:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:  # which its head alone may cause
        raise BadImage(f"it is a broken .npy file ({error})") from None


def _from_array(image: np.ndarray) -> Pixels:
    if image.ndim not in (2, 3):
        raise BadImage(f"its shape is {image.shape}; [H, W] and [H, W, channels] can be read")
    return Pixels(image[..., None] if image.ndim == 2 else image)


def _exif_orientation(data: bytes) -> int:
    try:
        return Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata of a picture that decoded well
        return 1


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    return _TURNS[orientation](image) if orientation in _TURNS else image


@functools.lru_cache(maxsize=4)
def _scale_table(max_value: int) -> np.ndarray:
    """All 16-bit values to 8 bits, rounded to nearest."""
    values = np.minimum(np.arange(65536), max_value)
    return ((values * 255 + max_value // 2) // max_value).astype(np.uint8)


def _to_channels(values: np.ndarray, alpha: bool, channels: int) -> np.ndarray:
    if values.shape[2] == channels:
        return values
    if alpha and channels in (1, 3):
        values = _over_white(values)
    have = values.shape[2]
    if have == channels:
        return values
    if have == 1 and channels == 3:
        return np.repeat(values, 3, axis=2)
    if have == 3 and channels == 1:
        return cv2.cvtColor(np.ascontiguousarray(values), cv2.COLOR_RGB2GRAY)[..., None]
    raise BadImage(
        f"it has {have} channels where config.data.channels is {channels} "
        f"(--config.data.channels={have} takes it)"
    )


def _over_white(values: np.ndarray) -> np.ndarray:
    opacity = values[..., 3:].astype(np.uint32)
    blend = values[..., :3] * opacity + 255 * (255 - opacity)
    return ((blend + 127) // 255).astype(np.uint8)
