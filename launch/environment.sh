# Sourced by the scripts beside it: goes to the repository's root, makes the virtual environment if
# there is none, and installs beit_jax into it with the tested versions of constraints.txt.
#
#   PYTHON  the Python to make it with (default: the first of python3, python3.12, python3.11,
#           python3.13 that has a version beit_jax runs on)
#   VENV    the environment's folder (default: .venv)
#   EXTRAS  further extras of setup.cfg, separated by commas: cuda, cuda13 or tpu
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}

fail() {
    echo "$*" >&2
    exit 1
}

# Whether $1 runs a Python that beit_jax supports (setup.cfg: python_requires).
suitable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

# Prints the Python to make the environment with.
choose_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        suitable "$PYTHON" || fail "PYTHON=$PYTHON does not run Python 3.11, 3.12 or 3.13;" \
            "give the path of one that does."
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.13; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "beit_jax needs Python 3.11, 3.12 or 3.13, but python3 here is" \
        "$(python3 --version 2>/dev/null || echo missing); install one and give its path:" \
        "PYTHON=/path/to/python3.12 $0"
}

make_environment() {
    local python
    if [[ -e $VENV ]]; then
        suitable "$VENV/bin/python" || fail "$VENV is not a working environment of Python 3.11," \
            "3.12 or 3.13 (moved, broken or interrupted?); delete it and run this again."
        return
    fi
    python=$(choose_python) || exit 1
    echo "Making $VENV with $("$python" --version)."
    if ! "$python" -m venv "$VENV"; then
        rm -rf "$VENV" # half an environment would be taken for a whole one next time
        fail "$python could not make the environment $VENV; on Debian and Ubuntu:" \
            "apt-get install python3-venv."
    fi
}

# prepare_environment [EXTRA]: the environment in $VENV has beit_jax and its extras installed.
prepare_environment() {
    local extras=${1:-} wanted stamp
    [[ -z ${EXTRAS:-} ]] || extras=${extras:+$extras,}$EXTRAS
    make_environment
    # Nothing is installed again while these files, and the place of this folder, are the same.
    stamp=$VENV/installed-${extras:-plain}
    wanted=$(cksum setup.cfg pyproject.toml constraints.txt)$PWD
    [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
    echo "Installing beit_jax${extras:+[$extras]} into $VENV (a minute or two the first time)."
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        --constraint constraints.txt --editable ".${extras:+[$extras]}" ||
        fail "The installation failed, pip says why above; mend that and run this again."
    echo "$wanted" >"$stamp"
}

# The status of a process that ended because another one had: JAX's abort, and what main makes alike.
# shellcheck disable=SC2034
ANOTHER_FAILED=134

# outcome STATUS: what became of a process, as the end of a sentence about it.
outcome() {
    case $1 in
    0) echo "has finished" ;;
    130) echo "was asked to stop, and saved" ;;
    134) echo "was ended by JAX because another process was lost" ;;
    137) echo "was killed (signal 9), by a person or for want of memory" ;;
    129 | 1[3-5]? | 16[0-4]) echo "was ended by signal $(($1 - 128)) ($(kill -l "$1"))" ;;
    *) echo "failed with status $1; its own output says why" ;;
    esac
}
