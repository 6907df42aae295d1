"""Writes constraints.txt anew from fresh installations on every supported Python.

    python3 launch/update_constraints.py python3.11 python3.12 python3.13

Each Python makes an environment, installs beit_jax with its test extra and no constraints, and has
its packages listed; versions that differ between Pythons get an environment marker. The launch
scripts notice the new file. Run `launch/test.sh` on each Python before committing it.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Ourselves, and what comes with the interpreter and not through us.
LEFT_OUT = {"beit-jax", "pip", "setuptools"}
HEADER = """\
# The versions that the test suite passed with, for each Python that beit_jax supports.
# Written by: python3 launch/update_constraints.py python3.11 python3.12 python3.13
# on {platform}. Used by: pip install -c constraints.txt -e .
# CUDA and TPU libraries follow from JAX's own bounds on them, and were resolved but not run.
"""


def normalized(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """Installs in a fresh environment; returns "3.x" and {distribution: version}."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = f"{folder}/bin/python"
        pip = [inside, "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "--editable", f"{ROOT}[test]"], check=True)
        subprocess.run([*pip, "check"], check=True)
        listed = subprocess.check_output([*pip, "list", "--format=freeze"], text=True)
        version = [inside, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        minor = subprocess.check_output(version, text=True).strip()
    pairs = (line.split("==") for line in listed.splitlines())
    pins = {normalized(name): pin.split("+")[0] for name, pin in pairs}  # no local build tags
    return minor, {name: pin for name, pin in pins.items() if name not in LEFT_OUT}


def merge(resolved: dict[str, dict[str, str]]) -> list[str]:
    """Constraint lines; one without marker where all Pythons agree."""
    lines, minors = [], sorted(resolved)
    for name in sorted(set().union(*resolved.values())):
        pins = {minor: found[name] for minor, found in resolved.items() if name in found}
        if len(set(pins.values())) == 1:
            lines.append(f"{name}=={next(iter(pins.values()))}")
            continue
        for pin in dict.fromkeys(pins[minor] for minor in minors if minor in pins):
            having = [minor for minor in minors if pins.get(minor) == pin]
            lines.append(f"{name}=={pin} ; {marker(having, minors)}")
    return lines


def marker(having: list[str], minors: list[str]) -> str:
    """The environment marker that is true on the Pythons `having` of all `minors`, both sorted."""
    if having == minors[-len(having) :]:
        return f'python_version >= "{having[0]}"'
    if having == minors[: len(having)]:
        return f'python_version < "{minors[len(having)]}"'
    return " or ".join(f'python_version == "{minor}"' for minor in having)


def main() -> None:
    """Resolves on each Python named on the command line and writes constraints.txt."""
    pythons = sys.argv[1:]
    if not pythons or pythons[0] in ("-h", "--help"):
        sys.exit(__doc__)
    resolved = dict(resolve(python) for python in pythons)
    header = HEADER.format(platform=f"{sys.platform}, Python {', '.join(sorted(resolved))}")
    (ROOT / "constraints.txt").write_text(header + "\n".join(merge(resolved)) + "\n")


if __name__ == "__main__":
    main()
