#!/usr/bin/env bash
# From a fresh clone to a pre-trained, evaluated BEiT on the built-in digits. Nothing is downloaded
# but the installation.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<'HELP'
Usage: launch/quickstart.sh [--v2] [--seed=N]

Makes .venv if there is none, installs beit_jax, then trains a tokenizer, pre-trains BEiT on its
tokens without labels, and answers "did pre-training help?", all on 1,797 real handwritten digits.
With --v2 that encoder then teaches BEiT v2's tokenizer, a second encoder is pre-trained on its
tokens, and the two are compared. An interrupted quick start goes on where it was. Runs and report
lie in runs/quickstart_N; the seed N is 0 unless given. PYTHON and VENV choose another Python and
another folder.

Examples:
  launch/quickstart.sh
  launch/quickstart.sh --v2
  EXTRAS=cuda launch/quickstart.sh      # on NVIDIA GPUs (cuda13: newest drivers); EXTRAS=tpu on TPU
HELP
    exit
fi
seed=0 v2=
for argument in "$@"; do
    if [[ $argument =~ ^--seed=([0-9]+)$ ]]; then
        seed=${BASH_REMATCH[1]}
    elif [[ $argument == --v2 ]]; then
        v2=yes
    else
        echo "launch/quickstart.sh takes --v2 and --seed=N, but got: $argument" >&2
        exit 1
    fi
done

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
if [[ $v2 ]]; then
    stage "BEiT v2's tokenizer, taught by that encoder" digits_vqkd vqkd \
        --config.teacher.path="$runs/mim"
    stage "A decoder of pixels, to look at its tokens" digits_pixel_decoder pixel_decoder \
        --config.tokenizer.path="$runs/vqkd"
    stage "Masked image modelling on these tokens" digits_mim_v2 mim_v2 \
        --config.tokenizer.path="$runs/pixel_decoder"
    stage "What its frozen features are worth" digits_mim_v2 mim_v2 --mode=eval $on_test
    compared=(dvae vqkd pixel_decoder mim mim_v2 random)
else
    for labels in 1 5 10 50; do
        stage "Fine-tuning on $labels labels a class, from pre-training" digits_classify \
            "pretrained_$labels" --config.init.path="$runs/mim" \
            --config.data.labels_per_class=$labels $on_test
        stage "Training on $labels labels a class, from scratch" digits_classify "scratch_$labels" \
            --config.init.path= --config.optimizer.layer_decay=1 \
            --config.data.labels_per_class=$labels $on_test
    done
    compared=(dvae mim random {scratch,pretrained}_{1,5,10,50})
fi

echo
"$VENV/bin/python" -m beit_jax.report "${compared[@]/#/$runs/}" --output="$runs/report.html"
