#!/usr/bin/env bash
# From a fresh clone to a tested one: environment, installation, ruff, the whole test suite.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<'HELP'
Usage: launch/test.sh [PYTEST ARGUMENT ...]

Makes .venv if there is none, installs beit_jax with its test extra, then runs ruff and pytest on
two workers. PYTHON and VENV choose another Python and another folder.

Examples:
  launch/test.sh                                    # everything
  launch/test.sh tests/test_masking.py -k counts    # a part
  launch/test.sh -n 0 -x --pdb                      # in one process, into the debugger
  VENV=.venv312 PYTHON=python3.12 launch/test.sh -m smoke
HELP
    exit
fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test

"$VENV/bin/ruff" check .
# Two workers: the time goes into compiling, which uses one core. A file stays on one worker, so
# that its tests share what they compiled; by name, since by number of tests the longest come last.
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
