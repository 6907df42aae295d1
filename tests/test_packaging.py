"""What a fresh machine meets: declared dependencies, tested versions, and launch scripts."""

import ast
import configparser
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from fake_machine import ROOT, SCRIPTS, copy_launch, executable, fake_python, script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.smoke

PYTHONS = ("3.11", "3.12", "3.13")


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(section: str, key: str) -> list[Requirement]:
    return [Requirement(line) for line in setup_cfg()[section][key].split("\n") if line]


def installed() -> list[Requirement]:
    return requirements("options", "install_requires")


def for_tests() -> list[Requirement]:
    return requirements("options.extras_require", "test")


def for_peers() -> list[Requirement]:
    """What tests/test_imports.py allows the benchmark's peer, and nothing else, to import."""
    return requirements("options.extras_require", "peers")


def imported(folder: str) -> set[str]:
    """Top-level names of all libraries that the files below a folder import."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    own = {"beit_jax", "configs"} | {path.stem for path in (ROOT / folder).glob("*.py")}
    return names - set(sys.stdlib_module_names) - own


def undeclared(folder: str, declared: list[Requirement]) -> set[str]:
    """Imported names that no declared distribution provides."""
    known = {canonicalize_name(requirement.name) for requirement in declared}
    providers = importlib.metadata.packages_distributions()
    return {
        name
        for name in imported(folder)
        if not known & {canonicalize_name(found) for found in providers.get(name, [name])}
    }


@pytest.fixture
def clone(tmp_path) -> Path:
    return copy_launch(tmp_path / "clone")


def test_every_import_is_declared():
    assert not undeclared("beit_jax", installed() + for_peers())
    assert not undeclared("configs", installed())
    assert not undeclared("tests", installed() + for_tests())


def test_an_undeclared_import_is_seen():
    without_jax = [requirement for requirement in installed() if requirement.name != "jax"]
    assert undeclared("beit_jax", without_jax + for_peers()) == {"jax"}


def test_nothing_that_gets_installed_is_torch_or_tensorflow():
    reached, todo = set(), [(requirement.name, "") for requirement in installed() + for_tests()]
    while todo:
        name, extra = todo.pop()
        if (canonicalize_name(name), extra) in reached:
            continue
        reached.add((canonicalize_name(name), extra))
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed.name, chosen) for chosen in ("", *needed.extras)]
    names = {name for name, _ in reached}
    assert "ml-dtypes" in names  # the walk goes below the direct requirements
    assert not names & {"torch", "tensorflow", "tensorflow-cpu", "tf-nightly"}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_each_direct_requirement_within_its_bounds(python):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {"python_version": python, "python_full_version": f"{python}.1"}
    valid = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(here)]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in valid}
    assert len(versions) == len(valid), "a distribution is pinned twice"
    for requirement in installed() + for_tests():
        pin = versions[canonicalize_name(requirement.name)]
        assert pin.startswith("==") and requirement.specifier.contains(pin.removeprefix("=="))
    assert versions["jax"].startswith("==0.10." if python == "3.11" else "==0.12.")


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_parse(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert path.name == "environment.sh" or path.stat().st_mode & 0o100


def shellcheck(*paths: Path) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("shellcheck")
    return subprocess.run(
        [program, "--external-sources", *paths], cwd=ROOT, capture_output=True, text=True
    )


def test_scripts_are_clean(tmp_path):
    checked = shellcheck(*SCRIPTS, ROOT / ".ci" / "run")
    assert checked.returncode == 0, checked.stdout
    broken = executable(tmp_path / "broken.sh", "#!/bin/bash\ncd $1\n")
    assert "SC2086" in shellcheck(broken).stdout


@pytest.mark.parametrize("name", ["local_processes", "quickstart", "test", "tpu_vm", "worker"])
def test_help_shows_an_example_and_installs_nothing(clone, name):
    result = script(clone / f"launch/{name}.sh", "--help")
    assert result.returncode == 0 and "Example" in result.stdout
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("chosen", [True, False])
def test_an_unsuitable_python_is_refused_in_one_sentence(clone, tmp_path, chosen):
    names = ("python3", "python3.11", "python3.12", "python3.13")
    for name in names:
        fake_python(tmp_path / "bin" / name, tmp_path / "record", "3.9.2", unsuitable=1)
    variables = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    if chosen:
        variables["PYTHON"] = str(tmp_path / "bin/python3")
    result = script(clone / "launch/quickstart.sh", **variables)
    assert result.returncode == 1 and not (clone / ".venv").exists()
    assert result.stderr.count("\n") == 1 and "3.11, 3.12 or 3.13" in result.stderr
    assert "PYTHON=" in result.stderr


def test_installs_once_until_a_version_changes(clone, tmp_path):
    record = tmp_path / "record"
    python = str(fake_python(tmp_path / "python", record))

    def installations() -> list[str]:
        result = script(clone / "launch/worker.sh", "install", PYTHON=python, EXTRAS="tpu")
        assert result.returncode == 0, result.stderr
        return record.read_text().splitlines()

    assert len(installations()) == 1
    assert installations()[0].endswith("--constraint constraints.txt --editable .[tpu]")
    assert len(installations()) == 1
    with open(clone / "constraints.txt", "a") as file:
        file.write("newcomer==1.0\n")
    assert len(installations()) == 2


def test_a_broken_environment_is_named(clone):
    (clone / ".venv").mkdir()
    result = script(clone / "launch/test.sh")
    assert result.returncode == 1 and "delete it" in result.stderr


def test_ci_misses_an_absent_python_before_it_starts(clone, tmp_path):
    executable(tmp_path / "bin/python3.11", "#!/bin/sh\necho 3.11\n")
    for name in ("python3", "python3.12", "pyenv"):
        executable(tmp_path / f"bin/{name}", "#!/bin/sh\nexit 127\n")
    result = script(clone / ".ci/run", PATH=f"{tmp_path}/bin:/usr/bin:/bin", HOME=str(tmp_path))
    assert result.returncode == 1 and result.stdout == ""
    assert "needs Python 3.12" in result.stderr
