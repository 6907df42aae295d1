"""Stand-ins for the programs that the launch scripts call, and a place to run the scripts in."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.s[hb]*"))  # .sh and .sbatch
# What a Python must answer for the launch scripts; `{record}` gets one line per installation.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    -c*) exit {unsuitable} ;;
    --version) echo Python {version} ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) echo "$*" >>{record} ;;
    *beit_jax.main*) printf '<%s>' "${{@:4}}"; echo; exec -a "python -m beit_jax.main" sleep 60 ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_python(path: Path, record: Path, version: str = "3.12.1", unsuitable: int = 0) -> Path:
    text = FAKE_PYTHON.format(version=version, unsuitable=unsuitable, record=record)
    return executable(path, text)


def script(path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a script with a small environment: the tests' own VENV, say, must not leak in."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent", **variables}
    return subprocess.run(
        [path, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def copy_launch(root: Path) -> Path:
    """Copies what the launch scripts read to `root`, so that no test touches the real .venv."""
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", ".ci/run", *SCRIPTS):
        source = ROOT / name
        target = root / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        target.chmod(source.stat().st_mode)
    return root
