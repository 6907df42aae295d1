#!/usr/bin/env bash
# From a fresh clone to a pre-trained, evaluated BEiT on the built-in digits. Nothing is downloaded
# but the installation.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<'HELP'
Usage: launch/quickstart.sh

Makes .venv if there is none, installs beit_jax, then trains a tokenizer, pre-trains BEiT on its
tokens and evaluates it, all on 1,797 real handwritten digits. An interrupted quick start goes on
where it was. PYTHON and VENV choose another Python and another folder.

Examples:
  launch/quickstart.sh
  EXTRAS=cuda launch/quickstart.sh      # on NVIDIA GPUs (cuda13: newest drivers); EXTRAS=tpu on TPU
HELP
    exit
fi
[[ $# == 0 ]] || {
    echo "launch/quickstart.sh takes no arguments, but got: $*; see launch/quickstart.sh --help." >&2
    exit 1
}

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

# The chain. Each stage reads the run folders of the stages before it, runs/<config name>.
stage() {
    "$VENV/bin/python" -m beit_jax.main "$@"
}
stage --config=configs/digits_dvae.py     # images -> visual tokens
stage --config=configs/digits_mim.py      # masked image modelling: predict the hidden tokens
stage --config=configs/digits_classify.py # did pre-training help? few labels, against from scratch
