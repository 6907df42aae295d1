"""PyTorch's archives: bit for bit what PyTorch wrote, in every format and for every type.

golden/archives holds small files of every kind that PyTorch wrote; its README has the program.
"""

import json
import re
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from archive_kit import ARCHIVES, put, refusal, text, unzipped, zipped
from golden_files import load
from safetensors.numpy import save_file

from beit_jax.interop import pytorch_writer
from beit_jax.interop.files import read

KINDS = {
    "dict.pth": "PyTorch archive (zip)",
    "dict_legacy.pth": "PyTorch archive (legacy)",
    "module.pkl": "pickled modules",
    "module_legacy.pkl": "pickled modules",
    "script.pt": "TorchScript archive",
    "traced.pt": "TorchScript archive",
}


def same(found, expected: np.ndarray) -> bool:
    array = np.asarray(found)
    sizes = (found.shape, found.dtype, found.nbytes) == (array.shape, array.dtype, array.nbytes)
    equal = array.shape == expected.shape and array.tobytes() == expected.tobytes()
    return sizes and equal and array.dtype == expected.dtype


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_bit_identical(name):
    found = read(str(ARCHIVES / name))
    assert found.kind == KINDS[name] and found.paths == (str(ARCHIVES / name),)
    expected = load("archives/" + ("dict" if name.startswith("dict") else "module"))
    tensors = dict(found.tensors)
    for script_only in ("blocks.0.scratch", "blocks.1.scratch"):  # TorchScript keeps them all
        assert (tensors.pop(script_only, None) is not None) == (found.kind == KINDS["script.pt"])
    assert set(tensors) == set(expected)
    if name.startswith("dict"):  # NumPy or the old format lack these types
        assert tensors["float8"].dtype in (ml_dtypes.float8_e4m3fn, np.float32)
        eights = np.asarray(tensors.pop("float8"), np.float32)
        np.testing.assert_array_equal(eights, expected.pop("float8"))
        wide = np.asarray(tensors.pop("uint16"))
        np.testing.assert_array_equal(wide, expected.pop("uint16"))
    for key, array in expected.items():
        assert same(tensors[key], array), key


def test_names_come_in_the_order_of_the_state_dict():
    block = ["gamma", "index", "fc.weight", "norm.weight", "norm.bias"]
    names = [f"blocks.{i}.{name}" for i in (0, 1) for name in block]
    assert list(read(str(ARCHIVES / "module.pkl")).tensors) == names
    assert list(read(str(ARCHIVES / "module_legacy.pkl")).tensors) == names
    assert "some_project" not in sys.modules  # the classes stayed names


@pytest.mark.parametrize("name", ["dict.pth", "dict_legacy.pth"])
def test_plain_values_beside_the_tensors_are_kept(name):
    extras = read(str(ARCHIVES / name)).extras
    args = extras.pop("args")
    assert args == {
        "model": "tiny", "lr": 1e-3, "betas": [0.9, 0.98], "size": [2, 3],
        "device": "cuda:1", "dtype": "torch.float16",
    }  # fmt: skip
    assert sorted(extras.pop("seen")) == ["a", "b"]
    assert extras == {
        "epoch": 3, "best": 0.5, "rng": "an array of shape (4,)", "out": "/out/run",
        "optimizer": "1 tensor, not read", "counts": {"a": 2, "b": 1},
    }  # fmt: skip
    json.dumps(extras)


def test_tensors_are_copies_of_what_the_file_shares():
    tensors = read(str(ARCHIVES / "dict.pth")).tensors
    whole, part = np.asarray(tensors["whole"]), np.asarray(tensors["offset"])
    assert whole.flags.owndata and not np.shares_memory(whole, part)
    assert np.asarray(tensors["whole"], np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="only in a copy"):
        np.asarray(tensors["whole"], np.float64, copy=False)


@pytest.mark.parametrize(
    "write", [pytorch_writer.write, lambda path, tensors: save_file(tensors, path)]
)
def test_reading_leaves_nothing_of_the_file_in_memory(write, tmp_path):
    def mapped() -> int:
        """Megabytes of files that are in this process's memory."""
        return (
            int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
        )

    write(tmp_path / "weights", {f"w{i}": np.ones((1024, 1024), np.float32) for i in range(16)})
    tensors, before = read(str(tmp_path / "weights")).tensors, mapped()
    for tensor in tensors.values():
        assert np.asarray(tensor).sum() == 1024 * 1024
        assert mapped() - before < 16  # of 64


def test_any_top_folder_and_order_of_entries(tmp_path):
    entries = unzipped((ARCHIVES / "dict.pth").read_bytes())
    for top in ("", "x/", "deep/er/"):
        moved = {top + n.partition("/")[2]: entries[n] for n in sorted(entries, reverse=True)}
        found = read(put(tmp_path, zipped(moved)))  # not aligned any more
        assert same(found.tensors["transposed"], load("archives/dict")["transposed"])
        for name, value in found.tensors.items():
            assert np.asarray(value).flags.aligned, name


def test_an_entry_that_is_not_where_the_directory_says(tmp_path):
    content = (ARCHIVES / "dict.pth").read_bytes()
    assert "not where its directory says" in refusal(
        tmp_path, content.replace(b"PK\3\4", b"PK\3\5")
    )


def legacy(storages: bytes, persistent: bytes, order: str = "little_endian", big: bytes = b"\x88"):
    rows = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    rows += b"\x80\x02}" + text(order) + big + b"s."
    call = b"ctorch._utils\n_rebuild_tensor\n("
    rows += b"\x80\x02}" + text("x") + call + persistent + b"QK\x00K\x02\x85K\x01\x85tRs."
    return rows + b"\x80\x02]" + text("7") + b"a." + storages


def test_storages_inside_storages_of_the_oldest_versions(tmp_path):
    """PyTorch before 0.4 wrote a view as (key, offset, length) behind the storage it lies in."""
    kind = b"ctorch\nFloatStorage\n"
    view = b"(" + text("9") + b"K\x03K\x02t"
    persistent = b"(" + text("storage") + kind + text("7") + text("cpu") + b"K\x05" + view + b"t"
    numbers = struct.pack("<q5f", 5, 0, 1, 2, 3, 4)
    found = read(put(tmp_path, legacy(numbers, persistent)))
    assert same(found.tensors["x"], np.array([3, 4], np.float32))
    assert "damaged" in refusal(tmp_path, legacy(numbers[:-4], persistent))
    assert "big-endian" in refusal(tmp_path, legacy(numbers, persistent, big=b"\x89"))
