"""The README's commands can be typed: flags, keys and files exist. Small runs are in test_main."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

from beit_jax import main

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, *sorted((ROOT / "configs").glob("*.py"))]
PARTS = ("beit_jax.benchmark", "beit_jax.convert", "beit_jax.prepare")  # have sub-commands


def commands() -> list[str]:
    """Every command line of the documentation, continuation lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found += re.findall(r"^\s*((?:python -m beit_jax|launch/\w+\.sh)[^\n#`]*)", text, re.M)
    return sorted({" ".join(command.split()) for command in found})


def test_there_are_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("command", [c for c in commands() if "beit_jax.main" in c])
def test_commands_of_main_are_parsed(command, monkeypatch):
    argv = shlex.split(command)[2:]
    if not any(word.startswith("--config=") for word in argv):  # a run's own, had it been trained
        argv.insert(1, "--config=configs/mim_base.py")
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for its keys
    monkeypatch.chdir(ROOT)
    with flagsaver.flagsaver():
        assert main.parse(argv) == argv[:1]


@pytest.mark.parametrize("command", [c for c in commands() if "beit_jax.main" not in c])
def test_other_commands_exist(command):
    words = shlex.split(command)
    if words[0] == "python":  # with the sub-command, which has flags of its own
        sub = words[3:4] if words[2] in PARTS else []
        run = [sys.executable, *words[1:3], *sub]
    else:
        run = [str(ROOT / words[0])]
    said = help_of(*run)
    for flag in re.findall(r"--[a-z_-]+", command):
        assert flag in said, f"{flag} is unknown to {words[0]}"


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists() or target.startswith("https://"), target
