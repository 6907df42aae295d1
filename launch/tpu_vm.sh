#!/usr/bin/env bash
# A TPU VM slice of one host or many: create it, install beit_jax on every worker, run there.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: launch/tpu_vm.sh create  NAME --zone=ZONE --type=TYPE [--version=IMAGE] [--spot]
       launch/tpu_vm.sh install NAME --zone=ZONE
       launch/tpu_vm.sh run     NAME --zone=ZONE -- ARGUMENT ...
       launch/tpu_vm.sh keep    NAME --zone=ZONE --type=TYPE [--spot] -- ARGUMENT ...
       launch/tpu_vm.sh log     NAME --zone=ZONE [--worker=NUMBER]
       launch/tpu_vm.sh stop    NAME --zone=ZONE
       launch/tpu_vm.sh delete  NAME --zone=ZONE

  create   makes the slice; one that is ready stays, one that was preempted is made anew
  install  copies this folder's files to every worker and installs beit_jax[tpu] there
  run      starts `python -m beit_jax.main ARGUMENT ...` on every worker, after stopping what an
           earlier `run` left; a run goes on from its last checkpoint. It lives on when this ends.
  keep     creates, installs and runs, and does so again whenever the slice is preempted or a host of
           it restarts, until the run has finished or failed, or is lost 5 times in a row within half
           an hour on a slice that stays; leave it running in a tmux, say
  log      the last lines of every worker's log, or of one worker's
Also --project=PROJECT (default: gcloud's own) and --dry-run (prints the commands, runs nothing).

Several hosts need a --workdir that all of them see: a Filestore (NFS) folder mounted on each, say.

Examples:
  launch/tpu_vm.sh create  beit --zone=us-central2-b --type=v4-32
  launch/tpu_vm.sh install beit --zone=us-central2-b
  launch/tpu_vm.sh run     beit --zone=us-central2-b -- \
      --config=configs/mim_base.py --config.data.data_dir=/shared/data --workdir=/shared/run
  launch/tpu_vm.sh keep    beit --zone=us-central2-b --type=v4-32 --spot -- --workdir=/shared/run
HELP
}

PAUSE=${PAUSE:-60} # seconds between two looks of `keep`
SOON=1800          # seconds within which a run that is lost on a slice that stays was of no use
MOST_LOST=5        # such runs in a row that `keep` takes, and looks that no host answers

fail() {
    echo "$*" >&2
    exit 1
}

# Runs a command, or prints it as a person would type it.
call() {
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# tpu VERB ARGUMENT ...: a gcloud command about TPU VMs, in the right place.
tpu() {
    call gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+--project="$project"} --quiet
}

# on_worker WHICH COMMAND: a shell command in the copied folder, on one worker or all.
on_worker() {
    tpu ssh "$name" --worker="$1" --command="cd beit_jax && $2"
}

# The image that Google names for each generation.
image_of() {
    case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "No image is known for --type=$1; name one with --version=IMAGE" \
        "(gcloud compute tpus versions list)." ;;
    esac
}

# What Google says of the slice, nothing if there is none; asked in a dry run too.
slice_state() {
    gcloud compute tpus tpu-vm describe "$name" --zone="$zone" ${project:+--project="$project"} \
        --format="value(state)" 2>/dev/null || true
}

check_kind() {
    [[ -n $type ]] || fail "Which kind of slice? Add --type=TYPE, v4-32 or v5litepod-16, say."
    version=${version:-$(image_of "$type")}
}

create() {
    check_kind
    local state
    state=$(slice_state)
    case $state in
    READY)
        echo "$name is ready already."
        return
        ;;
    PREEMPTED | TERMINATED)
        echo "$name was lost ($state); making it anew."
        tpu delete "$name"
        ;;
    "") ;;
    *) fail "$name is in state $state; wait until it is READY, or delete it:" \
        "launch/tpu_vm.sh delete $name --zone=$zone" ;;
    esac
    tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

install() {
    local files
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    git rev-parse --git-dir >/dev/null 2>&1 || fail "install copies the files that git knows or" \
        "does not ignore, but $PWD is no git repository; clone beit_jax with git."
    files=$(mktemp -d)/beit_jax.tar.gz
    git ls-files -z --cached --others --exclude-standard |
        tar --null --files-from=- --ignore-failed-read --create --gzip --file="$files"
    tpu scp "$files" "$name:beit_jax.tar.gz" --worker=all
    rm -r "$(dirname "$files")"
    tpu ssh "$name" --worker=all --command="mkdir -p beit_jax && \
tar xzf beit_jax.tar.gz -C beit_jax && cd beit_jax && EXTRAS=tpu launch/worker.sh install"
}

nothing_to_run() {
    fail "Nothing to run; add -- and arguments of python -m beit_jax.main," \
        "for example: -- --config=configs/mim_base.py --workdir=/shared/run"
}

run() {
    ((${#arguments[@]})) || nothing_to_run
    # Quoted once for the shell there; a process that ran before has let go of the chips then.
    on_worker all "launch/worker.sh stop"
    # A host whose chips cannot be had fails, and does not go on as a slow one on its CPU.
    on_worker all "JAX_PLATFORMS=tpu,cpu launch/worker.sh start $(printf '%q ' "${arguments[@]}")"
}

# What has become of the run: running, finished, failed, lost, or unknown while no host answers.
verdict() {
    local said
    [[ $(slice_state) == READY ]] || { echo lost && return; }
    said=$(on_worker all "launch/worker.sh state") || { echo unknown && return; }
    said=$(grep -Ex "running|lost|ended [0-9]+" <<<"$said" | sort -u)
    if [[ -z $said ]]; then
        echo unknown
    elif grep -qvEx "running|lost|ended (0|130|134|137|143)" <<<"$said"; then
        echo failed
    elif grep -qvEx "running|ended 0" <<<"$said"; then
        echo lost # stopped, killed, or ended because another was
    elif [[ $said == "ended 0" ]]; then
        echo finished
    else
        echo running
    fi
}

# Waits until the run has ended, or its hosts do not answer any more; sets `state`, its verdict.
watch_run() {
    local unknown=0
    while ((unknown < MOST_LOST)); do
        state=$(verdict)
        case $state in
        running) unknown=0 ;;
        unknown) unknown=$((unknown + 1)) ;;
        *) break ;;
        esac
        sleep "$PAUSE"
    done
}

keep() {
    local slice=("$name" --zone="$zone" ${project:+--project="$project"} ${dry_run:+--dry-run}) state
    ((${#arguments[@]})) || nothing_to_run
    check_kind
    local kind=(--type="$type" --version="$version" ${spot:+--spot}) lost=0 started
    while true; do
        started=$SECONDS state=lost # unless it can be started
        if "$0" create "${slice[@]}" "${kind[@]}" && "$0" install "${slice[@]}"; then
            "$0" run "${slice[@]}" -- "${arguments[@]}" || true # its verdict follows
            [[ -n $dry_run ]] || watch_run
        fi
        [[ -z $dry_run ]] || return 0
        case $state in
        finished) echo "The run on $name has finished." && return ;;
        failed) log || true && fail "The run on $name has failed; the logs are above." ;;
        esac
        lost=$((SECONDS - started < SOON ? lost + 1 : 0))
        [[ $(slice_state) == READY ]] || lost=0
        ((lost < MOST_LOST)) || { log || true && fail "The run on $name was lost $lost times in a" \
            "row, soon after its start; the logs are above."; }
        echo "$(date -u +%FT%TZ) the run on $name is lost; starting it again."
        sleep "$PAUSE"
    done
}

log() { on_worker "$worker" "launch/worker.sh log"; }
stop() { on_worker all "launch/worker.sh stop"; }
delete() { tpu delete "$name"; }

verb=${1:-} name="" zone=${ZONE:-} project="" type="" version="" spot="" worker=all dry_run=""
arguments=()
case $verb in
-h | --help)
    usage
    exit
    ;;
create | install | run | keep | log | stop | delete) shift ;;
"") fail "Do what? create, install, run, keep, log, stop or delete; see launch/tpu_vm.sh --help." ;;
*) fail "tpu_vm.sh knows create, install, run, keep, log, stop and delete, but not '$verb';" \
    "see launch/tpu_vm.sh --help." ;;
esac
while (($#)); do
    case $1 in
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot) spot=yes ;;
    --dry-run) dry_run=yes ;;
    -h | --help)
        usage
        exit
        ;;
    --)
        arguments=("${@:2}")
        break
        ;;
    -*) fail "Unknown option $1; options of beit_jax.main go behind --, and see --help." ;;
    *)
        [[ -z $name ]] || fail "One slice at a time, but got '$name' and '$1'; arguments of" \
            "beit_jax.main go behind --."
        name=$1
        ;;
    esac
    shift
done
[[ -n $name ]] || fail "Which slice? launch/tpu_vm.sh $verb NAME --zone=ZONE"
[[ -n $zone ]] || fail "In which zone is $name? Add --zone=ZONE, or set the variable ZONE."
[[ -n $dry_run ]] || command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk."
"$verb"
