#!/usr/bin/env bash
# A real SLURM on this machine, and launch/slurm.sbatch submitted to it: munge, a controller, two nodes on two ports.
# By hand, as root on Debian:
#   apt-get install slurm-wlm munge
#   bash tests/slurm/run.sh 2>&1 | tee slurm.log          with `sarjax` and the tests' packages on the PATH
# All of it runs in namespaces of its own and is gone at the end; nothing of the machine's own SLURM is touched.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ -z "${IN_NAMESPACE:-}" ]; then
    IN_NAMESPACE=1 exec unshare --mount --pid --fork --kill-child --mount-proc bash "$0" "$@"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
say() { printf '\n=== %s\n' "$*"; }

# ---------------------------------------------------------------- munge, two nodes
{ cat /etc/hosts && echo "127.0.0.1 node0 node1"; } >"$work/hosts"
mount --bind "$work/hosts" /etc/hosts
for folder in /etc/munge /var/lib/munge /var/log/munge /run/munge; do
    mkdir -p "$folder"
    mount -t tmpfs -o mode=755 tmpfs "$folder"
    chown munge:munge "$folder"
done
(umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
chown munge:munge /etc/munge/munge.key
runuser -u munge -- munged

mkdir -p "$work/state"
export SLURM_CONF=$work/slurm.conf
cat >"$SLURM_CONF" <<END
ClusterName=here
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
LaunchParameters=use_interactive_step
ReturnToService=2
MessageTimeout=100
KillWait=60
NodeName=node0 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=26818 CPUs=1
NodeName=node1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=26819 CPUs=1
PartitionName=all Nodes=node0,node1 Default=YES State=UP
END
slurmctld
slurmd -N node0
slurmd -N node1
for _ in $(seq 60); do
    if [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ]; then break; fi
    sleep 2
done
say "$(sinfo --version), two nodes"
sinfo -N -l

# ------------------------------------------------------------------- what is found where
find="from sarjax.cli.distributed import detect; import os; print(detect(os.environ))"
say "an interactive allocation of two tasks: its shell is one process"
salloc -N2 -n2 <<<"env | grep -E '^SLURM_(NTASKS|STEP_NUM_TASKS|PROCID)=' | sort; python -c '$find'" 2>&1
say "a command of it outside of any step: nothing is found"
salloc -N2 -n2 python -c "$find" 2>&1
say "a step of two tasks"
srun -N2 -n2 --label python -c "$find"

# ------------------------------------------------------------------------------- a training
say "records"
PYTHONPATH=$root:$root/tests python - "$work" <<'END'
import sys
from pathlib import Path
import fake_data
from sarjax.data.build import build
folder = Path(sys.argv[1])
fake_data.write_ombria(folder / "source")
print(build("ombria", folder / "source", folder / "records"))
END
export JAX_PLATFORMS=cpu RECIPE=ombria_s1 WORKDIR=$work/run DATA=$work/records
export OPTIONS="--network fcn --network.stages 1 --network.width 0.0625 --augment.crop 32 --batch-size 4 --steps 400
 --no-tensorboard --log-every 50 --evaluate-every 400 --checkpoint-every 400"
log=$work/job.out
job=$(sbatch --parsable --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 --time=60 --output="$log" \
    "$root/launch/slurm.sbatch")
say "launch/slurm.sbatch, job $job; at step 100 its batch shell gets SIGTERM, as --signal=B:TERM@180 would send it"
until grep -q "step 100/" "$log" 2>/dev/null; do sleep 1; done
squeue -o "%i %T %D nodes %N, restarts %r"
scancel --batch --signal=TERM "$job"
until grep -q "queued again" "$log"; do sleep 1; done
sleep 5
say "queued again by itself:"
scontrol show job "$job" | grep -E "JobState|Restarts|EligibleTime"
while [ -n "$(squeue -h -j "$job" 2>/dev/null)" ]; do sleep 2; done
say "done:"
scontrol show job "$job" | grep -E "JobState|Restarts|NumTasks"
cat "$log"
grep -q "step 400/400" "$log"
python - "$WORKDIR" <<'END'
import json, sys
starts = json.load(open(f"{sys.argv[1]}/manifest.json"))["starts"]
print([{key: start[key] for key in ("step", "processes", "devices")} for start in starts])
END
say "a wrong command: said by the first task alone, and not queued again"
export OPTIONS="$OPTIONS --no-such-option"
sbatch --wait --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 --time=60 --output="$work/bad.out" \
    "$root/launch/slurm.sbatch" || echo "exit code $?"
cat "$work/bad.out"
