#!/usr/bin/env bash
# Several processes of one run on this machine, as on as many hosts: to try that, or a GPU for each.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h || $# == 0 ]]; then
    cat <<'HELP'
Usage: launch/local_processes.sh NUMBER [--] ARGUMENT ...   of `python -m beit_jax.main`

Starts NUMBER processes that train together, shares the machine's GPUs out among them, and marks
each line with the number of its process. Ctrl-C stops them all after a checkpoint, a second one at
once. When one fails the others are ended, and the last line says which it was, and of what. VENV
(default: .venv) is the environment that launch/worker.sh install makes.

Example:
  launch/local_processes.sh 2 -- --config=configs/digits_dvae.py --workdir=runs/two
HELP
    exit
fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PATIENCE=${PATIENCE:-15} # seconds in which the others may end by themselves, saying why
number=$1
shift
[[ ${1:-} != -- ]] || shift
[[ $number =~ ^[1-9][0-9]*$ ]] || fail "How many processes? launch/local_processes.sh 2 -- --config=..."
[[ -x $VENV/bin/python ]] || fail "beit_jax is not installed; run launch/worker.sh install first."
gpus=0
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
    ((gpus % number == 0)) || fail "$gpus GPUs cannot be shared out evenly among $number processes;" \
        "start another number of them."
fi
port=$("$VENV/bin/python" -c \
    'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')

pids=()      # of each process
running=()   # the numbers of those that live
failed=()    # the numbers of those that ended with another status than 0, in order
statuses=()  # of those that ended
markers=()   # the programs that mark their lines
overdue=0    # whether the rest is being killed
signals=0    # how often this script was asked to stop

start() {
    local process=$1 share=$((gpus / number)) gpu devices="" out asked
    shift
    exec {out}> >(trap '' INT TERM && exec sed --unbuffered "s/^/[$process] /")
    markers+=($!)
    ((share == 0)) || export JAX_LOCAL_DEVICE_IDS
    # No $(...) in here: while bash waits for one, a Ctrl-C may be lost.
    for ((gpu = process * share; gpu < (process + 1) * share; gpu++)); do devices+=,$gpu; done
    JAX_LOCAL_DEVICE_IDS=${devices#,}
    "$VENV/bin/python" -u -m beit_jax.main "$@" --coordinator="localhost:$port" \
        --num_processes="$number" --process_id="$process" >&"$out" 2>&1 &
    pids+=($!)
    # One command, so that no signal comes between: either `stop` found this process among those
    # that run, or it had been asked for before and is made up for here.
    asked=$signals running+=("$process")
    ((asked == 0)) || kill -TERM "${pids[process]}" 2>/dev/null || true
    exec {out}>&-
}

# send SIGNAL: to every process that lives.
send() {
    local process
    for process in "${running[@]}"; do kill "-$1" "${pids[process]}" 2>/dev/null || true; done
}

# Processes in the background do not hear Ctrl-C; TERM makes them save.
# shellcheck disable=SC2329
stop() {
    signals=$((signals + 1))
    if ((signals == 1)); then send TERM; else send KILL; fi
}

# Notes who has ended since the last look.
look() {
    local process status alive=()
    for process in "${running[@]}"; do
        if kill -0 "${pids[process]}" 2>/dev/null; then
            alive+=("$process")
            continue
        fi
        status=0
        wait "${pids[process]}" || status=$?
        statuses[process]=$status
        ((status == 0 || overdue)) || failed+=("$process")
    done
    running=("${alive[@]}")
}

trap stop INT TERM
trap 'send KILL' EXIT # leaves nothing behind, whatever happens here
deadline=$((SECONDS + PATIENCE))
for ((process = 0; process < number && signals == 0; process++)); do start "$process" "$@"; done
until ((${#running[@]} == 0)); do
    sleep 0.1 || true # Ctrl-C ends it
    look
    ((${#failed[@]} && !signals)) || deadline=$((SECONDS + PATIENCE))
    if ((SECONDS >= deadline)); then
        overdue=1
        send KILL
    fi
done
# Until the last line is out; what a killed process leaves running may hold on to the output.
last=$((SECONDS + 2))
while kill -0 "${markers[@]}" 2>/dev/null && ((SECONDS < last)); do sleep 0.1; done
kill -KILL "${markers[@]}" 2>/dev/null || true
((${#failed[@]})) || exit 0

culprit=${failed[0]}
for process in "${failed[@]}"; do
    if ((statuses[process] != ANOTHER_FAILED)); then
        culprit=$process
        break
    fi
done
((statuses[culprit] == 130)) || echo "launch/local_processes.sh: process $culprit" \
    "$(outcome "${statuses[culprit]}"), and the others were ended; the same command goes on from" \
    "the last checkpoint." >&2
exit "${statuses[culprit]}"
