#!/usr/bin/env bash
# A TPU slice: the same command on all of its workers. jax finds out by itself which of them it is.
#
#   launch/tpu_vm.sh [--dry-run] install                 this checkout and jax for TPUs
#   launch/tpu_vm.sh [--dry-run] data                    the records, from the bucket to each worker's own disk
#   launch/tpu_vm.sh [--dry-run] train RECIPE [OPTIONS]  `sarjax train`, with --workdir and --data-dir as below
#   launch/tpu_vm.sh [--dry-run] stop                    SIGTERM: a checkpoint is saved; train goes on from it
#
# --dry-run prints the commands and runs none. To be changed, here or in the environment:
TPU=${TPU:-my-slice}
ZONE=${ZONE:-us-central2-b}
PROJECT=${PROJECT:-}                                # "" = gcloud's own
RECORDS=${RECORDS:-gs://my-bucket/sarjax_data}      # built records
DATA=${DATA:-/tmp/sarjax_data}                      # on the worker; array_record reads no bucket
WORKDIR=${WORKDIR:-/mnt/shared/runs/tpu}            # on a file system that all workers mount, such as Filestore

set -euo pipefail
cd "$(dirname "$0")/.."

dry=0
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; fi

run() {
    if [ "$dry" = 1 ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

where=(--zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --worker=all)

everywhere() {
    run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$1"
}

verb=${1:-}
shift || true
case $verb in
install)
    archive=${TMPDIR:-/tmp}/sarjax.tar.gz
    run git archive --format=tar.gz --prefix=sarjax/ --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$TPU:sarjax.tar.gz" "${where[@]}"
    everywhere "tar -xzf sarjax.tar.gz && python3 -m venv venv && venv/bin/pip install './sarjax[tpu]'"
    ;;
data)
    everywhere "$(printf 'mkdir -p %q && gcloud storage rsync --recursive %q %q' "$DATA" "$RECORDS" "$DATA")"
    ;;
train)
    recipe=${1:?a recipe is needed: launch/tpu_vm.sh train RECIPE [OPTIONS]}
    shift
    everywhere "$(printf '%q ' venv/bin/sarjax train "$recipe" --workdir "$WORKDIR" --data-dir "$DATA" --distributed on "$@")"
    ;;
stop)
    everywhere "pkill -TERM -f 'venv/bin/[s]arjax train'"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
