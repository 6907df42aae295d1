#!/usr/bin/env bash
# From a fresh clone to a pre-trained, evaluated BEiT on the built-in digits. Nothing is downloaded
# but the installation.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<'HELP'
Usage: launch/quickstart.sh [--seed=N]

Makes .venv if there is none, installs beit_jax, then trains a tokenizer, pre-trains BEiT on its
tokens without labels, and answers "did pre-training help?", all on 1,797 real handwritten digits.
An interrupted quick start goes on where it was. Runs and report lie in runs/quickstart_N; the seed
N is 0 unless given. PYTHON and VENV choose another Python and another folder.

Examples:
  launch/quickstart.sh
  EXTRAS=cuda launch/quickstart.sh      # on NVIDIA GPUs (cuda13: newest drivers); EXTRAS=tpu on TPU
HELP
    exit
fi
seed=0
if [[ $# == 1 && $1 =~ ^--seed=([0-9]+)$ ]]; then
    seed=${BASH_REMATCH[1]}
elif [[ $# != 0 ]]; then
    echo "launch/quickstart.sh takes --seed=N and nothing else, but got: $*" >&2
    exit 1
fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

runs=runs/quickstart_$seed
# The few-label runs differ in data and start only, so what one compiled serves the others.
export JAX_COMPILATION_CACHE_DIR=$PWD/$runs/compiled

stage() {
    echo
    echo "== $1"
    "$VENV/bin/python" -m beit_jax.main --config="configs/$2.py" --workdir="$runs/$3" \
        --config.seed="$seed" "${@:4}"
}

# Settings were chosen on the validation split; what is printed is the test split, read once.
on_test=--config.data.eval_split=test
stage "Images to visual tokens" digits_dvae dvae
stage "Masked image modelling: predict the hidden tokens" digits_mim mim \
    --config.tokenizer.path="$runs/dvae"
stage "What its frozen features are worth" digits_mim mim --mode=eval $on_test
stage "The same of an encoder with random weights" digits_mim random \
    --config.tokenizer.path="$runs/dvae" --config.train.epochs=0 $on_test
for labels in 1 5 10; do
    stage "Fine-tuning on $labels labels a class, from pre-training" digits_classify \
        "pretrained_$labels" --config.init.path="$runs/mim" \
        --config.data.labels_per_class=$labels $on_test
    stage "Training on $labels labels a class, from scratch" digits_classify "scratch_$labels" \
        --config.init.path= --config.optimizer.layer_decay=1 \
        --config.data.labels_per_class=$labels $on_test
done

echo
"$VENV/bin/python" -m beit_jax.report "$runs"/{dvae,mim,random} "$runs"/{scratch,pretrained}_{1,5,10} \
    --output="$runs/report.html"
