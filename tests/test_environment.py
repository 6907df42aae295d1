"""A run's folder says where and with what it ran."""

import shlex
import sys

import jax

from beit_jax import environment


def test_a_line_for_each_start(tmp_path):
    environment.note(tmp_path, "train", 0, parameters=12)
    environment.note(tmp_path, "eval", 7, parameters=12)
    first, second = environment.read(tmp_path)
    assert (first["mode"], first["step"], first["parameters"]) == ("train", 0, 12)
    assert (second["mode"], second["step"]) == ("eval", 7)
    assert first["devices"] == 8 and first["jax"] == jax.__version__
    assert shlex.split(first["command"])[1:] == sys.orig_argv[1:]
    assert first["host"] and first["time"].startswith("20")
    with open(tmp_path / environment.FILE, "a") as file:
        file.write('{"mode": "tra')  # a crash
    assert len(environment.read(tmp_path)) == 2
    assert environment.read(tmp_path / "elsewhere") == []


def test_the_commit_is_the_clones(tmp_path, monkeypatch):
    found = environment.describe()["commit"]
    assert (found is not None) == (environment.ROOT / ".git").exists()
    monkeypatch.setattr(environment, "ROOT", tmp_path)  # an installed package
    assert environment.describe()["commit"] is None
    (tmp_path / ".git").write_text("gitdir: nowhere")
    assert environment.describe()["commit"] is None


def test_a_clone_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "LIBRARIES", ("jax", "beit_jax_of_nobody"))
    found = environment.describe()
    assert found["jax"] == jax.__version__ and found["beit_jax_of_nobody"] is None
