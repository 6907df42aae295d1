#!/usr/bin/env bash
# One host of a run: installs beit_jax here, starts, stops and shows the training process.
# launch/tpu_vm.sh calls this on every host of a slice; it serves any machine reached by ssh.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h || $# == 0 ]]; then
    cat <<'HELP'
Usage: launch/worker.sh install
       launch/worker.sh start ARGUMENT ...   arguments of `python -m beit_jax.main`
       launch/worker.sh stop
       launch/worker.sh log
       launch/worker.sh state

`start` leaves the process running when the connection ends, writes to logs/<host>.log, and first
stops the process that an earlier `start` left: saying it again resumes the run. `stop` asks the
process to end (it may save a checkpoint for a minute) and then makes it. `state` says "running",
"ended STATUS", or "lost" where the machine went down with it. EXTRAS=tpu or EXTRAS=cuda is what
`install` installs JAX for.

Example:
  EXTRAS=tpu launch/worker.sh install
  launch/worker.sh start --config=configs/mim_base.py --workdir=/shared/run
HELP
    exit
fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
LOG=logs/$(hostname).log
PID_FILE=logs/$(hostname).pid
STATUS_FILE=logs/$(hostname).status

# The images of TPU VMs come with a Python older than beit_jax's oldest; uv brings a newer one
# without root.
install() {
    if [[ ! -e $VENV ]] && ! (choose_python) >/dev/null 2>&1; then
        echo "$(hostname): no Python 3.11, 3.12 or 3.13 here, installing 3.12 with uv."
        python3 -m pip install --quiet --user uv || fail "$(hostname): uv could not be installed."
        python3 -m uv python install --quiet 3.12 || fail "$(hostname): uv found no Python 3.12."
        # shellcheck disable=SC2034
        PYTHON=$(python3 -m uv python find 3.12) # what prepare_environment reads
    fi
    prepare_environment
}

# Whether the process of the last `start` lives; its number may belong to another one by now.
running() {
    [[ -s $PID_FILE ]] && [[ $(ps -o args= -p "$(<"$PID_FILE")" 2>/dev/null) == *beit_jax.main* ]]
}

# wait_while_running SECONDS
wait_while_running() {
    local end=$((SECONDS + $1))
    while running && ((SECONDS < end)); do sleep 0.2; done
}

stop() {
    running || return 0
    echo "$(hostname): stopping process $(<"$PID_FILE")."
    kill -TERM "$(<"$PID_FILE")"
    wait_while_running 90
    running || return 0
    kill -KILL "$(<"$PID_FILE")"
    wait_while_running 10
}

start() {
    [[ -x $VENV/bin/python ]] || fail "$(hostname): not installed; run launch/worker.sh install first."
    stop
    mkdir -p logs
    echo "=== $(date -u +%FT%TZ) python -m beit_jax.main $*" >>"$LOG"
    rm -f "$PID_FILE" "$STATUS_FILE"
    # Its own session, so that it outlives this connection.
    setsid nohup launch/worker.sh hold "$@" >>"$LOG" 2>&1 </dev/null &
    until [[ -s $PID_FILE ]]; do sleep 0.05; done
    wait_while_running 3
    if ! running; then
        tail -n 20 "$LOG" >&2
        fail "$(hostname): the run ended at once; its log is above."
    fi
    echo "$(hostname): process $(<"$PID_FILE") runs, its log is $PWD/$LOG"
}

# What `start` leaves behind: the process, and a last line for its log when it has ended.
hold() {
    local status=0
    "$VENV/bin/python" -u -m beit_jax.main "$@" &
    echo $! >"$PID_FILE"
    wait $! || status=$?
    echo "=== $(date -u +%FT%TZ) the process on $(hostname) $(outcome "$status")"
    echo "$status" >"$STATUS_FILE"
}

state() {
    if running; then
        echo running
    elif [[ -f $STATUS_FILE ]]; then
        echo "ended $(<"$STATUS_FILE")"
    else
        echo lost
    fi
}

log() {
    [[ -f $LOG ]] || fail "$(hostname): no log yet; launch/worker.sh start writes $LOG."
    tail -n 20 "$LOG"
    running || echo "$(hostname): no process is running."
}

verb=$1
shift
case $verb in
install | start | hold | stop | log | state) "$verb" "$@" ;;
*) fail "worker.sh knows install, start, stop, log and state, but not '$verb';" \
    "see launch/worker.sh --help." ;;
esac
