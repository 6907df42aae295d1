"""PyTorch's archives: bit for bit what PyTorch reads, nothing run, and bounded whatever they hold.

golden/archives holds small files of every kind that PyTorch wrote; its README has the program.
"""

import json
import os
import pickle
import struct
import sys
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
from archive_kit import ARCHIVES, archive, mutations, tensor, text, unzipped, zipped
from golden_files import load

from beit_jax.errors import UserError
from beit_jax.interop.files import read

KINDS = {
    "dict.pth": "PyTorch archive (zip)",
    "dict_legacy.pth": "PyTorch archive (legacy)",
    "module.pkl": "pickled modules",
    "module_legacy.pkl": "pickled modules",
    "script.pt": "TorchScript archive",
    "traced.pt": "TorchScript archive",
}
SEEDS = sorted(p for p in ARCHIVES.iterdir() if p.suffix != ".md")
MOST_BYTES = 2**20  # what is allowed above 16 times the file


def put(tmp_path, content: bytes) -> str:
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    return str(path)


def refusal(tmp_path, content: bytes) -> str:
    """The sentence that a file gets."""
    with pytest.raises(UserError) as caught:
        read(put(tmp_path, content))
    sentence = str(caught.value)
    assert "\n" not in sentence and str(tmp_path) in sentence
    return sentence


def same(found, expected: np.ndarray) -> bool:
    array = np.asarray(found)
    sizes = (found.shape, found.dtype, found.nbytes) == (array.shape, array.dtype, array.nbytes)
    equal = array.shape == expected.shape and array.tobytes() == expected.tobytes()
    return sizes and equal and array.dtype == expected.dtype


# What PyTorch wrote


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


def test_tensors_are_views_of_the_file_and_cannot_be_written():
    tensors = read(str(ARCHIVES / "dict.pth")).tensors
    whole, part = np.asarray(tensors["whole"]), np.asarray(tensors["offset"])
    assert np.shares_memory(whole, part)
    assert not whole.flags.writeable and not whole.flags.owndata
    copied = np.array(tensors["whole"])
    assert copied.flags.writeable and not np.shares_memory(whole, copied)
    assert np.asarray(tensors["whole"], np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="only in a copy"):
        np.asarray(tensors["whole"], np.float64, copy=False)


def test_any_top_folder_and_order_of_entries(tmp_path):
    entries = unzipped((ARCHIVES / "dict.pth").read_bytes())
    for top in ("", "x/", "deep/er/"):
        moved = {top + n.partition("/")[2]: entries[n] for n in sorted(entries, reverse=True)}
        found = read(put(tmp_path, zipped(moved)))  # not aligned any more
        assert same(found.tensors["transposed"], load("archives/dict")["transposed"])
        assert same(found.tensors["float64"], load("archives/dict")["float64"])


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


# What is refused


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("echo ran > {path}",), "system"),
        (eval, ("open('{path}', 'w')",), "eval"),
        (exec, ("open('{path}', 'w')",), "exec"),
        (open, ("{path}", "w"), "open"),
        (getattr, (os, "system"), "getattr"),
    ],
)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "zip"])
def test_a_call_is_named_and_not_made(function, arguments, name, protocol, wrap, tmp_path):
    proof = tmp_path / "ran"
    arguments = [a.format(path=proof) if isinstance(a, str) else 1 for a in arguments]
    hostile = pickle.dumps({"model": Call(function, *arguments)}, protocol)
    if wrap:
        hostile = zipped({"archive/data.pkl": hostile})
    sentence = refusal(tmp_path, hostile)
    assert f".{name}" in sentence and "nothing of it was run" in sentence
    assert not proof.exists()


HOSTILE = {
    "REDUCE": (b"cos\nsystem\n" + text("true") + b"\x85R", "would call os.system"),
    "NEWOBJ": (b"cos\nsystem\n" + text("true") + b"\x85\x81", "would call os.system"),
    "NEWOBJ_EX": (b"cos\nsystem\n)}" + text("a") + b"Ns\x92", "would call os.system"),
    "OBJ": (b"(cos\nsystem\n" + text("true") + b"o", "would call os.system"),
    "INST": (b"(" + text("true") + b"ios\nsystem\n", "would call os.system"),
    "STACK_GLOBAL": (text("os") + text("system") + b"\x93)R", "would call os.system"),
    "a bare name": (b"cos\nsystem\n", "would import os.system"),
    "an inner name": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n)}tR",
        "would call os.system",
    ),
    "a wrapper subclass": (
        b"ctorch._utils\n_rebuild_wrapper_subclass\n)R",
        "torch._utils._rebuild_wrapper_subclass",
    ),
    "a nested file": (b"ctorch.storage\n_load_from_bytes\n)R", "torch.storage._load_from_bytes"),
    "EXT": (b"\x82\x01", "EXT1"),
    "PERSID": (b"Px\n", "PERSID"),
    "an object array": (b"cnumpy\ndtype\n" + text("O8") + b"\x85R", "'O8'"),
    "quantized": (tensor((4,), (1,), kind="QInt8Storage"), "torch.QInt8Storage"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_instructions_that_import_or_call(case, tmp_path):
    instructions, said = HOSTILE[case]
    assert said in refusal(tmp_path, archive(instructions))


def test_records_do_nothing_with_hostile_attributes(tmp_path):
    attributes = b"".join(text(n) + b"N" for n in ("__class__", "__dict__", "__reduce__", "build"))
    record = b"csome\nClass\n)\x81}(" + attributes + b"ub"
    hostile = b"\x80\x02}(" + text("x") + record + text("w") + tensor((4,), (1,)) + b"u."
    found = read(put(tmp_path, zipped({"a/data.pkl": hostile, "a/data/0": bytes(16)})))
    assert list(found.tensors) == ["w"] and found.extras == {"x": "a some.Class"}


@pytest.mark.parametrize(
    "wrong",
    [
        tensor((5,), (1,)),
        tensor((4,), (1,), offset=1),
        tensor((4,), (1,), offset=-1),
        tensor((2, 2), (4, 1)),
        tensor((2,), (-1,), offset=1),
        tensor((2, 2), (1,)),
        tensor((-1,), (1,)),
        tensor((2**61, 0), (0, 0)),
        tensor((4,), (1,), count=5),
        tensor((4,), (1,), count=-4),
        tensor((4,), (1,), key="1"),
    ],
)
def test_tensors_outside_their_storage_are_damage(wrong, tmp_path):
    assert same(read(put(tmp_path, archive(tensor((4,), (1,))))).tensors["x"], np.zeros(4, "f"))
    assert "damaged" in refusal(tmp_path, archive(wrong))


def test_a_few_bytes_stand_for_no_huge_tensor(tmp_path):
    fair = read(put(tmp_path, archive(tensor((64, 64), (0, 0), count=1))))
    assert np.asarray(fair.tensors["x"]).shape == (64, 64)
    huge = archive(tensor((2**20, 2**20), (0, 0), count=1))
    assert "far larger than itself" in refusal(tmp_path, huge)


def test_compressed_and_foreign_zip_archives(tmp_path):
    entries = unzipped((ARCHIVES / "dict.pth").read_bytes())
    assert "zip -0 -r" in refusal(tmp_path, zipped(entries, zipfile.ZIP_DEFLATED))
    big = {n: b"big" if n.endswith("byteorder") else e for n, e in entries.items()}
    assert "big-endian" in refusal(tmp_path, zipped(big))
    assert ".npz" in refusal(tmp_path, zipped({"a.npy": b""}))
    assert "TorchScript archive from before" in refusal(tmp_path, zipped({"a/model.json": b""}))
    assert "other files" in refusal(tmp_path, zipped({"a.txt": b""}))


MODULE = text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + b"}"
TWICE = [b"h" + bytes([i]) for i in range(200)]
COPY = b"h\x02h\x01R" * 100_000
BOMBS = {
    "instructions": b"(" + b"]" * 1_000_001 + b"t",
    "nested keys": b"}" + b")" + b"\x85" * 100_000 + b"Ns",
    "an integer": b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6,
    "copied text": b"(" + text("a" * 10**6) + b"\x85q\x01cpathlib\nPosixPath\nq\x02" + COPY + b"t",
    "copied lists": b"(" + text("a" * 10**6) + b"\x85q\x01cbuiltins\nlist\nq\x02" + COPY + b"t",
    "long keys": b"}" + text("a" * 5000) + b"Ns",
    "laughs": b"]q\x00" + b"".join(b"](%b%be" % (x, x) + b"q" + bytes([i + 1])
                                     for i, x in enumerate(TWICE)) + b"}" + text("x") + b"hcs",
    "modules in modules": b"csome\nM\n)\x81q\x00}(" + MODULE + text("a") + b"h\x00sub",
    "deep lists": b"}" + text("x") + b"]" * 100_000 + b"a" * 99_999 + b"s",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_in_bounded_time(bomb, tmp_path):
    start = time.perf_counter()
    refusal(tmp_path, zipped({"a/data.pkl": b"\x80\x02" + BOMBS[bomb] + b"."}))
    assert time.perf_counter() - start < 10  # seconds, for what takes one


FORBIDDEN_EVENTS = ("import", "exec", "compile", "os.system", "subprocess.Popen", "os.exec")


def test_mutated_archives_give_an_error_or_an_archive(tmp_path):
    """Every mutation ends in one sentence or in tensors of bounded size, and nothing is run."""
    for path in SEEDS:  # what the readers import by themselves is imported by now
        [np.array(value) for value in read(str(path)).tensors.values()]
    "".encode("cp437")  # zip archives of the 1980s name their entries so
    seen, watching, longest, outcomes = [], True, 0.0, {True: 0, False: 0}
    sys.addaudithook(lambda event, _: watching and event in FORBIDDEN_EVENTS and seen.append(event))
    for number, content in enumerate(mutations([p.read_bytes() for p in SEEDS], 2400, seed=0)):
        path = tmp_path / str(number)
        path.write_bytes(content)
        start = time.perf_counter()
        try:
            found = read(str(path))
            total = sum(np.array(value).nbytes for value in found.tensors.values())
            assert total <= 16 * len(content) + MOST_BYTES
            outcomes[True] += 1
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            outcomes[False] += 1
        longest = max(longest, time.perf_counter() - start)
        path.unlink()
    watching = False
    assert not seen and longest < 5
    assert min(outcomes.values()) > 200, "mutations should break much, and not everything"
