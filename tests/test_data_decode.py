"""Every kind of image file, against Pillow or against the pixels it was written from."""

import io
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.datasets import load_sample_image

from beit_jax.data import jpeg
from beit_jax.data.decode import BadImage, decode


def picture(height=40, width=60, channels=3) -> np.ndarray:
    """A smooth picture without symmetry, which survives JPEG well."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(3 * x + c) * 0.5 + np.cos(2 * y * (c + 1)) * 0.5 for c in range(channels)]
    return np.clip((np.stack(waves, -1) * 0.4 + 0.5) * 255, 0, 255).astype(np.uint8)


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb(data, channels=3, max_value=65535) -> np.ndarray:
    return decode(data, channels=channels, max_value=max_value)


def assert_close(actual, wanted, tolerance=0):
    assert actual.dtype == np.uint8 and actual.shape == wanted.shape
    assert np.abs(actual.astype(int) - wanted).max() <= tolerance


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_forms_come_back_in_rgb_order(form):
    assert_close(rgb(encode(Image.fromarray(picture()), form)), picture())


@pytest.mark.parametrize("form, options", [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_photograph_forms_agree_with_pillow(form, options):
    data = encode(Image.fromarray(picture()), form, **options)
    assert_close(rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), 2)
    assert_close(rgb(data), picture(), 8)


def test_cmyk_jpeg_has_its_colours():
    data = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    assert_close(rgb(data), picture(), 10)


def test_cmyk_tiff_has_its_colours():
    assert_close(rgb(encode(Image.fromarray(picture()).convert("CMYK"), "TIFF")), picture(), 2)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey_bilevel_and_palette(mode, form):
    image = Image.fromarray(picture()).convert(mode)
    assert_close(rgb(encode(image, form)), np.asarray(image.convert("RGB")))


def test_grey_jpeg_is_repeated():
    grey = Image.fromarray(picture()).convert("L")
    actual = rgb(encode(grey, "JPEG", quality=95))
    assert_close(actual, np.asarray(grey.convert("RGB")), 8)


def test_one_channel_is_luma():
    wanted = np.asarray(Image.fromarray(picture()).convert("L"))[..., None]
    assert_close(rgb(encode(Image.fromarray(picture()), "PNG"), channels=1), wanted, 1)
    grey = Image.fromarray(wanted[..., 0])
    assert_close(rgb(encode(grey, "PNG"), channels=1), wanted)


@pytest.mark.parametrize(
    "form, options",
    [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {}),
     ("TIFF", {"compression": "tiff_lzw"})],
)  # fmt: skip
def test_transparent_pixels_lie_over_white(form, options):
    image = Image.fromarray(picture()).convert("RGBA")
    opacity = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    image.putalpha(Image.fromarray(opacity))
    white = Image.new("RGBA", image.size, "white")
    wanted = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    actual = rgb(encode(image, form, **options))
    assert (actual[:, 0] == 255).all()
    assert_close(actual, wanted, 1)
    assert_close(rgb(encode(image, form, **options), channels=4), np.asarray(image), 0)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_with_alpha_and_transparent_palette_entries(form):
    image = Image.fromarray(picture()).convert("LA")
    image.putalpha(0)
    assert (rgb(encode(image, form)) == 255).all()
    palette = Image.new("P", (5, 4), 7)
    palette.putpalette(list(range(256)) * 3)
    assert (rgb(encode(palette, "PNG", transparency=7)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
    data = encode(Image.fromarray(picture()), form, exif=exif, **options)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    upright = Image.fromarray(picture())
    wanted = np.asarray(upright if turn is None else upright.transpose(turn))
    assert_close(rgb(data), wanted, 8 if form == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_orientation_of_tiff_with_many_channels(orientation):
    values = picture(channels=5)
    buffer = io.BytesIO()
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(
        buffer, values, photometric="minisblack", planarconfig="contig", extratags=[tag]
    )
    exif = Image.Exif()
    exif[274] = orientation
    plain = encode(Image.fromarray(values[..., :3]), "PNG", exif=exif)
    assert_close(rgb(buffer.getvalue(), channels=5)[..., :3], rgb(plain))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_by_max_value(suffix, channels):
    values = picture(channels=channels).astype(np.uint16) * 16
    data = cv2.imencode(suffix, values[..., ::-1])[1].tobytes()
    assert_close(rgb(data, channels, max_value=4080), picture(channels=channels))
    # Twice as bright a maximum is half as bright a picture, whatever the image's own range.
    assert_close(rgb(data, channels, max_value=8160), picture(channels=channels) // 2, 1)
    # What lies above the maximum is white, and does not wrap around.
    white = rgb(data, channels, max_value=160)[picture(channels=channels) > 10]
    assert (white == 255).all()
    full = cv2.imencode(suffix, np.full((4, 5), 65535, np.uint16))[1].tobytes()
    assert (rgb(full, 1) == 255).all()


@pytest.mark.parametrize("channels", [2, 4, 5, 8])
@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_tiff_with_many_channels(channels, layout, kind):
    values = picture(20, 30, channels)
    stored = values.astype(kind) * (257 if kind is np.uint16 else 1)
    stored = np.moveaxis(stored, -1, 0) if layout == "separate" else stored
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, stored, photometric="minisblack", planarconfig=layout)
    assert_close(rgb(buffer.getvalue(), channels), values)


def test_infrared_beside_rgb_is_not_taken_for_opacity():
    buffer = io.BytesIO()
    values = picture(channels=4)
    tifffile.imwrite(buffer, values, photometric="rgb", extrasamples=["UNSPECIFIED"])
    assert_close(rgb(buffer.getvalue(), 4), values)
    with pytest.raises(BadImage, match="4 channels where config.data.channels is 3"):
        rgb(buffer.getvalue())


def test_npy_and_arrays():
    for values in (picture(channels=6), picture(channels=6).astype(np.uint16) * 257):
        buffer = io.BytesIO()
        np.save(buffer, values)
        assert_close(rgb(buffer.getvalue(), 6), picture(channels=6))
        assert_close(rgb(values, 6), picture(channels=6))
    assert_close(rgb(picture()[..., 0], 1), picture()[..., :1])


def test_channels_that_do_not_fit_name_the_key():
    with pytest.raises(BadImage, match=r"6 channels where config\.data\.channels is 3 .*=6"):
        rgb(picture(channels=6))


def npy(values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b"\xff\xd8\xff", b"II*\0" + bytes(9), b"\x93NUMPY",
     npy(np.array([None])), npy(np.zeros((3, 3))), npy(np.zeros((2, 3, 4, 5), np.uint8)),
     npy(np.zeros((0, 3, 3), np.uint8))],
)  # fmt: skip
def test_what_is_no_image_is_refused(data):
    with pytest.raises(BadImage):
        rgb(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_files_are_refused(form):
    data = encode(Image.fromarray(picture(200, 300)), form)
    with pytest.raises(BadImage):
        rgb(data[: len(data) * 9 // 10])


def test_float_tiff_is_refused_with_its_type():
    with pytest.raises(BadImage, match="float32"):
        rgb(encode(Image.fromarray(picture()).convert("F"), "TIFF"))


PHOTO = Image.fromarray(load_sample_image("china.jpg")[:301, :399])
TURN = Image.Exif()
TURN[274] = 6


def fill_memory(monkeypatch, value, shapes=None):
    """Has jpeg.py find memory full of a value; notes the shapes that it asks for."""

    def empty(shape, dtype):
        if shapes is not None:
            shapes.append(shape)
        return np.full(shape, value, dtype)

    monkeypatch.setattr(jpeg, "np", SimpleNamespace(empty=empty, uint8=np.uint8))


@pytest.mark.parametrize(
    ("options", "quick"),
    [
        ({}, True),
        ({"subsampling": 0}, True),
        ({"subsampling": 1}, True),
        ({"restart_marker_rows": 1}, True),
        ({"restart_marker_blocks": 3, "comment": b"x" * 300}, True),
        ({"progressive": True}, False),
        ({"exif": TURN}, False),
        ({"keep_rgb": True}, False),
    ],
)
def test_a_box_of_a_jpeg_is_what_the_whole_has_there(options, quick, monkeypatch, capfd):
    data = encode(PHOTO, "JPEG", quality=90, **options)
    whole, seen = rgb(data), []
    fill_memory(monkeypatch, 0, seen)
    height, width = whole.shape[:2]
    for top, left, h, w in [(0, 3, 1, 5), (10, 0, 87, width), (100, 7, 64, 64), (40, 0, 255, 9)]:
        box = (top, left, min(h, height - top), w)
        found = decode(data, channels=3, max_value=255, box_of=lambda h, w, box=box: box)
        np.testing.assert_array_equal(found, whole[top : top + h, left : left + w])
    assert [shape[0] for shape in seen] == ([17, 113, 180, 301] if quick else [])
    assert not capfd.readouterr().err


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_box_of_other_images_and_channels(form):
    data = encode(PHOTO.convert("L"), form)
    for channels in (1, 3):
        found = decode(
            data, channels=channels, max_value=255, box_of=lambda h, w: (9, 8, 20, w - 8)
        )
        np.testing.assert_array_equal(found, rgb(data, channels)[9:29, 8:])


def test_a_jpeg_cut_short_is_refused_even_where_the_box_is_whole():
    data = encode(PHOTO, "JPEG")
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2], channels=3, max_value=255, box_of=lambda h, w: (0, 0, 9, 9))


def some_box(height, width):
    return 3, 4, 20, 30


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_broken_jpegs_never_show_what_lay_in_memory(options, monkeypatch):
    """Bytes are changed at random, more often in the head, where errors are fatal."""
    data = encode(PHOTO.resize((48, 64)), "JPEG", **options)
    chance, decided = np.random.default_rng(0), []
    for _ in range(400):
        broken = bytearray(data)
        for place in chance.integers(2, chance.choice([200, 700, len(data)]), 2):
            broken[place] = chance.choice([0, 255, chance.integers(256)])
        found = []
        for memory in (0x55, 0xAA):
            fill_memory(monkeypatch, memory)
            try:
                crop = decode(bytes(broken), channels=3, max_value=255, box_of=some_box)
                found.append(crop.tobytes())
            except BadImage:
                found.append(b"")
        assert found[0] == found[1]
        decided.append(found[0] != b"")
    assert 0.1 < np.mean(decided) < 0.95
