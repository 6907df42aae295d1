"""Archives that mean harm or are broken: nothing is run, and time and memory stay bounded."""

import os
import pickle
import struct
import sys
import time
import zipfile

import numpy as np
import pytest
from archive_kit import (
    ARCHIVES,
    archive,
    mutations,
    numbers,
    pickled,
    put,
    refusal,
    tensor,
    text,
    unzipped,
    zipped,
)  # fmt: skip

from beit_jax.errors import UserError
from beit_jax.interop.files import read

SEEDS = sorted(p for p in ARCHIVES.iterdir() if p.suffix != ".md")
MOST_BYTES = 2**20  # what is allowed above 16 times the file


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
    "quantized": (tensor((4,), (1,), kind="QInt8Storage"), "a storage of type torch.QInt8Storage"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_instructions_that_import_or_call(case, tmp_path):
    instructions, said = HOSTILE[case]
    assert said in refusal(tmp_path, archive(instructions))


def test_records_do_nothing_with_hostile_attributes(tmp_path):
    attributes = b"".join(text(n) + b"N" for n in ("__class__", "__dict__", "__reduce__", "build"))
    record = b"csome\nClass\n)\x81}(" + attributes + b"ub"
    hostile = b"}(" + text("x") + record + text("w") + W + b"u"
    found = read(put(tmp_path, pickled(hostile)))
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
    fair = read(put(tmp_path, archive(tensor((4,), (1,))))).tensors["x"]
    assert np.array_equal(fair, np.zeros(4))
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


def module(children: bytes, parameters: bytes = b"}") -> bytes:
    """A record of a class, with the dictionaries of a module."""
    tables = text("_parameters") + parameters + text("_buffers") + b"}" + text("_modules")
    return b"csome\nM\n)\x81}(" + tables + b"}(" + children + b"uub"


def pairs(levels: int) -> bytes:
    """Lists of the list before, twice: 2^levels of them, for one that walks without a limit."""
    twice = [b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(levels)]
    return b"]q\x000" + b"".join(twice) + b"h%c" % levels


def families(levels: int) -> bytes:
    """Modules that hold the module before under two names."""
    twice = [
        module(text("a") + b"h%c" % i + text("b") + b"h%c" % i) + b"q%c0" % (i + 1)
        for i in range(levels)
    ]
    return module(b"") + b"q\x000" + b"".join(twice) + b"h%c" % levels


W = tensor((4,), (1,))
DEEP = b")" + b"\x85" * 200_000
MILLION = text("a" * 10**6)
COPY = b"h\x02h\x01R" * 100_000
REBUILD = (
    b"cnumpy\nndarray\n)R"
    + b"(K\x01"
    + numbers((10**6,))
    + b"cnumpy\ndtype\n"
    + text("u1")
    + b"\x85R\x89"
)
BOMBS = {
    "instructions": (b"(" + b"]" * 1_000_001 + b"t", "more than 1,000,000 instructions"),
    "nested keys": (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "holds a tuple as the key"),
    "an integer": (b"\x8b" + struct.pack("<i", 99) + b"\x7f" * 99, "an integer is too long"),
    "text": (b"(" + MILLION + b"\x85q\x01cpathlib\nPath\nq\x02" + COPY + b"t", "copies its own"),
    "lists": (b"(" + MILLION + b"\x85q\x01cbuiltins\nlist\nq\x02" + COPY + b"t", "copies its own"),
    "arrays": (MILLION + b"q\x000(" + (REBUILD + b"h\x00tb") * 9000 + b"t", "copies its own"),
    "long keys": (b"}" + text("a" * 5000) + b"Ns", "more than 4096 letters"),
    "long integers": (b"}\x8a\x10" + b"\x7f" * 16 + b"Ns", "more than 64 bits"),
    "sets in sets": (b"(\x91" + b"q\x00(h\x00\x91" * 2, "holds a frozenset"),
    "a deep byte order": (b"cnumpy\ndtype\n" + text("f4") + b"\x85RK\x03" + DEEP + b"\x86b",
                          "holds a tuple as the key"),
    "a deep type": (b"cnumpy\ndtype\n" + DEEP + b"\x85R", "a NumPy type without a name"),
    "a deep device": (b"ctorch\ndevice\n" + text("cpu") + DEEP + b"\x86R", "damaged"),
    "a deep storage": (b"(" + text("storage") + b"ctorch\nFloatStorage\n" + DEEP + text("cpu")
                       + b"K\x01tQ", "holds a tuple as the key"),
    "wide modules": (b"}(" + b"".join(text(str(i)) + b"N" for i in range(10_000)) + b"uq\x000"
                     + module(b"".join(text(str(i)) + module(b"", b"h\x00") for i in range(2000))),
                     "without end"),
    "one list for all": (b"(" + W + b"N" * 10_000 + b"lq\x000}(" + text("w") + W
                         + b"".join(text(str(i)) + b"h\x00" for i in range(10_000)) + b"u",
                         "too many names"),
    "a circle": (b"csome\nM\n)\x81q\x00}(" + text("_parameters") + b"}" + text("_buffers") + b"}"
                 + text("_modules") + b"}" + text("a") + b"h\x00sub", "without end"),
    "many paths": (families(60), "without end"),
    "many lists": (b"}(" + text("w") + W + text("x") + pairs(40) + b"u",
                   "too many names"),
    "a deep list": (b"}" + text("x") + b"]" * 100_000 + b"a" * 99_999 + b"s", "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_in_bounded_time(bomb, tmp_path):
    instructions, said = BOMBS[bomb]
    start = time.process_time()
    assert said in refusal(tmp_path, pickled(instructions))
    assert time.process_time() - start < 30  # seconds of the processor, for what takes a few


def test_deep_values_beside_the_tensors_are_told_in_part(tmp_path):
    deep = b"]" * 10_000 + b"a" * 9_999
    content = b"}(" + text("w") + W + text("x") + deep + b"u"
    found = read(put(tmp_path, pickled(content)))
    assert list(found.tensors) == ["w"] and "..." in repr(found.extras["x"])


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
        start = time.process_time()
        try:
            found = read(str(path))
            total = sum(np.array(value).nbytes for value in found.tensors.values())
            assert total <= 16 * len(content) + MOST_BYTES
            outcomes[True] += 1
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            outcomes[False] += 1
        longest = max(longest, time.process_time() - start)
        path.unlink()
    watching = False
    assert not seen and longest < 5
    assert min(outcomes.values()) > 200, "mutations should break much, and not everything"
