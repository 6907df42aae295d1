"""Which files of a folder are read, what is around the tensors, and what wrong files are told."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from archive_kit import ARCHIVES, archive, pickled, put, refusal, sentence, tensor, text
from safetensors.numpy import save_file

from beit_jax.errors import UserError
from beit_jax.interop.files import read

ONES = np.ones((2, 3), np.float32)


# Folders


def test_a_hugging_face_folder(tmp_path):
    save_file({"a": ONES}, tmp_path / "model.safetensors")
    save_file({"b": ONES}, tmp_path / "tensors.safetensors")
    (tmp_path / "meta.json").write_text("{}")
    found = read(str(tmp_path))
    assert list(found.tensors) == ["a"] and found.about == {} and found.preprocessing == {}
    (tmp_path / "config.json").write_text('{"model_type": "beit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 8}')
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read(str(path))
        assert found.about == {"model_type": "beit"} and found.preprocessing == {"size": 8}
        assert found.paths == (str(tmp_path / "model.safetensors"),)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="config.json is damaged"):
        read(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards(name, tmp_path):
    for shard, key in [("one", "a"), ("two", "b"), ("three", "c")]:
        save_file({key: ONES}, tmp_path / shard)
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one", "b": "two", "c": "three"}}))
    found = read(str(tmp_path))
    assert set(found.tensors) == {"a", "b", "c"} and found.kind == "safetensors in 3 shards"
    (tmp_path / "two").unlink()
    with pytest.raises(UserError, match="two cannot be read"):
        read(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": "../one"}}))
    with pytest.raises(UserError, match="lists no files beside it"):
        read(str(tmp_path))


def test_dall_e_pair_and_each_alone(tmp_path):
    for part in ("encoder", "decoder"):
        shutil.copy(ARCHIVES / "module.pkl", tmp_path / f"{part}.pkl")
    names = list(read(str(ARCHIVES / "module.pkl")).tensors)
    found = read(str(tmp_path))
    assert list(found.tensors) == [f"{p}.{n}" for p in ("encoder", "decoder") for n in names]
    assert found.kind == "pickled modules" and len(found.paths) == 2
    assert list(read(str(tmp_path / "encoder.pkl")).tensors) == names
    (tmp_path / "decoder.pkl").unlink()
    assert list(read(str(tmp_path)).tensors) == names


def test_a_folder_with_one_weight_file_whatever_its_name(tmp_path):
    shutil.copy(ARCHIVES / "dict.pth", tmp_path / "notes.txt")
    (tmp_path / "README.md").write_text("# Weights")
    (tmp_path / "config.json").write_text("{}")
    assert read(str(tmp_path)).kind == "PyTorch archive (zip)"
    save_file({"a": ONES}, tmp_path / "tensors.safetensors")
    assert read(str(tmp_path)).kind == "PyTorch archive (zip)"
    save_file({"a": ONES}, tmp_path / "another")
    said = sentence(tmp_path)
    assert "several weight files (another, notes.txt)" in said


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    assert "no weight file (found nothing)" in sentence(tmp_path)
    (tmp_path / "page.pth").write_text("<html>")
    assert "no weight file (found page.pth)" in sentence(tmp_path)


# Around the tensors


def test_types_of_safetensors_come_out_right_and_late(tmp_path):
    types = [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint16, np.bool_]
    arrays = {np.dtype(t).name: ONES.astype(t) for t in [*types, ml_dtypes.bfloat16]}
    arrays |= {"scalar": np.full((), 2.5, np.float32), "empty": np.zeros((0, 3), np.int32)}
    save_file(arrays, tmp_path / "x")
    tensors = read(str(tmp_path / "x")).tensors
    for name, array in arrays.items():
        found = np.asarray(tensors[name])
        assert tensors[name].dtype == found.dtype == array.dtype
        assert tensors[name].shape == found.shape == array.shape
        assert tensors[name].nbytes == found.nbytes and found.tobytes() == array.tobytes()
    assert np.asarray(tensors["bfloat16"], np.float32).sum() == 6


def test_a_type_of_safetensors_without_a_place(tmp_path):
    save_file({"a": ONES.astype(ml_dtypes.float8_e5m2)}, tmp_path / "x")
    assert "F8_E5M2" in sentence(tmp_path / "x")


def entry(name: str, value: bytes) -> bytes:
    return text(name) + value


def dictionary(*entries: bytes) -> bytes:
    return b"}(" + b"".join(entries) + b"u"


W = tensor((4,), (1,))


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (("model", "module", "teacher"), "model"),
        (("state_dict", "module", "optimizer"), "module"),
        (("student", "teacher"), "teacher"),
        (("weights", "teacher", "state_dict"), "state_dict"),
        (("weights", "teacher"), "weights"),
    ],
)
def test_the_first_wrapper_counts_and_the_others_are_told(present, chosen, tmp_path):
    inner = [entry(name, dictionary(entry(f"{name}_w", W))) for name in present]
    content = dictionary(*inner, entry("epoch", b"K\x07"))
    found = read(put(tmp_path, pickled(content)))
    assert list(found.tensors) == [f"{chosen}_w"]
    others = {name: "1 tensor, not read" for name in present if name != chosen}
    assert found.extras == others | {"epoch": 7}


def test_bare_dictionaries_and_names_of_parallel_training(tmp_path):
    content = dictionary(
        entry("module.a", W), entry("module.module.b", W), entry("model", text("vit")), b"K\x01N"
    )
    found = read(put(tmp_path, pickled(content)))
    assert list(found.tensors) == ["a", "module.b"]
    assert found.extras == {"model": "vit", "1": None}
    content = dictionary(entry("module.a", W), entry("b", W))
    found = read(put(tmp_path, pickled(content)))
    assert list(found.tensors) == ["module.a", "b"]  # a module of that name: nothing to strip


def test_dictionaries_without_a_state_dict_say_what_they_hold(tmp_path):
    nested = archive(dictionary(entry("w", W)))
    assert "no tensors where a state dict was looked for (found x)" in refusal(tmp_path, nested)
    assert "holds no dictionary of tensors but a list" in refusal(tmp_path, pickled(b"]"))


# Wrong files

LOG = (
    "--2023-05-11 10:00:00--  https://host/beit.pth\n"
    "Resolving host (host)... 1.2.3.4\nLength: 346 [text]\n"
)
XML = '\ufeff<?xml version="1.0" encoding="utf-8"?><Error><Code>BlobNotFound</Code></Error>'
PNG, JPEG = b"\x89PNG\r\n\x1a\n" + bytes(50), b"\xff\xd8\xff\xe0" + bytes(50)
TAR = b"name".ljust(257, b"\0") + b"ustar\x0000" + bytes(600)
WRONG = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
    "xml": (XML.encode(), "an XML answer of a server (BlobNotFound)"),
    "wget": (LOG.encode(), "`wget -O`"),
    "json": (b'{"message": "Not Found"}', "JSON text"),
    "text": (b"Not Found", "is text"),
    "a sentence": (b"could not find it.", "is text"),
    "png": (PNG, "a PNG image"),
    "jpeg": (JPEG, "a JPEG image"),
    "tar": (TAR, "a tar archive; unpack it"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "a gzip archive; unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(50), "a single NumPy array"),
    "noise": (bytes(range(1, 256)), "in no known format"),
    "zeros": (bytes(1000), "in no known format"),
    "one byte": (b"\x80", "damaged or cut short"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_called_what_they_are(case, tmp_path):
    content, said = WRONG[case]
    assert said in refusal(tmp_path, content)


def test_a_text_cut_inside_a_letter_is_still_text(tmp_path):
    assert "is text" in refusal(tmp_path, ("a" * 4095 + "ü" * 100).encode())


@pytest.mark.parametrize("name", ["dict.pth", "dict_legacy.pth", "module.pkl", "dict.safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_files(name, share, tmp_path):
    whole = (ARCHIVES / name).read_bytes()
    assert "is damaged or cut short" in refusal(tmp_path, whole[: int(share * len(whole))])


def test_paths_that_cannot_be_read(tmp_path):
    assert "No such file" in sentence(tmp_path / "nothing.pth")
    os.mkfifo(tmp_path / "pipe")
    assert "no ordinary file" in sentence(tmp_path / "pipe")
