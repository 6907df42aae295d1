"""The README's commands can be typed: flags, keys and files exist. Small runs are in test_main."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, *sorted((ROOT / "configs").glob("*.py"))]
PARTS = ("beit_jax.benchmark", "beit_jax.convert", "beit_jax.prepare")  # have sub-commands

PARSE = """
import sys
from absl import flags
from beit_jax import main
rest = main.parse(sys.argv)
assert len(rest) == 1, rest
"""


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
def test_commands_of_main_are_parsed(command):
    flags = shlex.split(command)[3:]
    if not any(flag.startswith("--config=") for flag in flags):  # a run's own, had it been trained
        flags.insert(0, "--config=configs/mim_base.py")
    done = subprocess.run(
        [sys.executable, "-c", PARSE, *flags], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if "beit_jax.main" not in c])
def test_other_commands_exist(command):
    words = shlex.split(command)
    if words[0] == "python":  # with the sub-command, which has flags of its own
        sub = words[3:4] if words[2] in PARTS else []
        run = [sys.executable, *words[1:3], *sub]
    else:
        run = [str(ROOT / words[0])]
    done = subprocess.run([*run, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for flag in re.findall(r"--[a-z_-]+", command):
        assert flag in done.stdout, f"{flag} is unknown to {words[0]}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists() or target.startswith("https://"), target
