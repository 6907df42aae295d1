"""A folder with every kind of broken image in it: a run finishes, and names them."""

import struct
import zlib

import cv2
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from beit_jax import metrics
from beit_jax.data import decode

GOOD = 700


def png(width: int, height: int) -> bytes:
    """A black grey-scale PNG, of which at most 3,000 rows are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packer, row = zlib.compressobj(9), bytes(width + 1)
    pixels = b"".join(packer.compress(row) for _ in range(min(height, 3_000))) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """1 % of the images are broken, and some are odd but good."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    (folder / "good").mkdir()
    for number in range(GOOD):
        pixels = random.integers(0, 256, (8, 8), np.uint8)
        cv2.imwrite(str(folder / "good" / f"{number}.png"), pixels)
    whole = cv2.imencode(".jpg", random.integers(0, 256, (40, 40, 3), np.uint8))[1].tobytes()
    exif = b"\xff\xe1\x00\x10Exif\0\0" + bytes(8)
    files = {
        "broken/truncated.jpg": whole[: len(whole) // 2],
        "broken/a_web_page.jpg": b"<html>not found</html>",
        "broken/empty.png": b"",
        "broken/zeros.png": bytes(1000),
        "broken/bomb.png": png(20_000, 20_000),
        "broken/claims.npy": b"\x93NUMPY\x01\0v\0"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(118),
        "odd/one_pixel.png": png(1, 1),
        "odd/large.png": png(3_000, 3_000),
        "odd/broken_exif.jpg": whole[:2] + exif + whole[2:],
    }
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (folder / "broken" / "link.png").symlink_to("nowhere.png")
    return folder


def trained(photos, folder, workers: int) -> list[dict]:
    tree = tiny.config(
        "classify",
        model__depth=1,
        data__source=f"folder:{photos}",
        data__workers=workers,
        data__holdout=0.0,
        data__eval_split="train",
        train__batch_size=64,
        train__steps=11,  # an epoch
    )
    tiny.run(tree, folder, jax.devices()[:1]).execute("train")
    return [line for line in metrics.read(folder) if line["split"] != "timing"]


def test_a_run_finishes_and_lists_them_whatever_the_workers(photos, tmp_path):
    none, many = (trained(photos, tmp_path / str(w), workers=w) for w in (0, 5))
    assert none == many
    for workers in "05":
        listed = (tmp_path / workers / "bad_files.txt").read_text().splitlines()
        reasons = dict(line.split("\t") for line in listed)
        assert sorted(reasons) == sorted(
            f"broken/{path.name}" for path in (photos / "broken").iterdir()
        )
        assert "400000000 pixels" in reasons["broken/bomb.png"]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "BMP", "GIF"])
def test_no_image_unpacks_beyond_the_limit(form, monkeypatch, tmp_path):
    path = tmp_path / "image"
    Image.new("RGB", (60, 50)).save(path, form)
    for read in (lambda data: decode.decode(data, channels=3, max_value=255), decode.read_size):
        monkeypatch.setattr(decode, "MAX_PIXELS", 60 * 50)
        read(path.read_bytes())
        monkeypatch.setattr(decode, "MAX_PIXELS", 60 * 50 - 1)
        with pytest.raises(decode.BadImage, match="60 x 50 pixels; up to 2,999 can be read"):
            read(path.read_bytes())
