#!/usr/bin/env bash
# Slurm for real on this machine alone (Debian: slurmctld slurmd slurm-client munge), as
# root: two tasks on the CPU train by launch/slurm.sh, the job is preempted by a SIGTERM,
# goes back into the queue and ends the run; one with a mistake in it does not.
#   bash tests/slurm_alone.sh
set -euo pipefail
cd "$(dirname "$0")/.."
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || {
    echo "error: no $program: apt-get install slurmctld slurmd slurm-client munge" >&2
    exit 2
  }
done
folder=$(mktemp -d)
host=$(hostname -s)
finish() {
  kill "${pids[@]}" 2>/dev/null || true
  sleep 2
  kill -KILL "${pids[@]}" 2>/dev/null || true
  wait
  rm -rf "$folder"
}
pids=()
trap finish EXIT

# reached SECONDS WHAT COMMAND: waits until the command succeeds; past SECONDS all fails
reached() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    if [ "$SECONDS" -ge "$end" ]; then
      tail -n 5 "$folder"/*.log >&2
      echo "error: waited in vain: $what" >&2
      exit 1
    fi
    sleep 0.5
  done
}
idle() { sinfo -h -o %t 2>/dev/null | grep -q idle; }
over() { [ -d "$run/checkpoints/600" ] && ! squeue -h -j "$job" -t R | grep -q .; }

head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
mkdir -p "$folder/ctld" "$folder/slurmd"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.s" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/seed" &
pids+=($!)
cat > "$folder/slurm.conf" <<CONF
ClusterName=alone
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthInfo=socket=$folder/munge.s
StateSaveLocation=$folder/ctld
SlurmdSpoolDir=$folder/slurmd
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld -D > "$folder/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D > "$folder/slurmd.log" 2>&1 &
pids+=($!)
reached 60 "the node is idle" idle
sinfo

run=$folder/run
job=$(JAX_NUM_CPU_DEVICES=1 sbatch --parsable --nodes=1 --ntasks=2 \
  --output="$folder/out" launch/slurm.sh --config configs/smoke.py --workdir "$run" \
  --config.train.total_steps=600 --config.train.ckpt_steps=100 --config.train.batch=16 \
  --config.optim.decay=constant --config.train.valid_steps=0 --config.train.sample_steps=0)
reached 120 "a checkpoint of the job" test -d "$run/checkpoints/100"
scancel --signal=TERM "$job.0"
reached 300 "the end of the job" over
cat "$folder/out"
ls "$run/checkpoints"
grep -q 'stopped by SIGTERM' "$folder/out"
grep -q 'back into the queue' "$folder/out"
test -d "$run/checkpoints/600"

status=0
JAX_NUM_CPU_DEVICES=1 timeout 300 sbatch --wait --nodes=1 --ntasks=2 --output="$folder/mistaken" \
  launch/slurm.sh --config configs/smoke.py --workdir "$folder/mistaken_run" \
  --config.data.source=text --config.data.path="$folder/none.txt" || status=$?
cat "$folder/mistaken"
test "$status" = 2
! grep -q 'back into the queue' "$folder/mistaken" || exit 1
echo "preempted, requeued and ended; a mistake is final"
