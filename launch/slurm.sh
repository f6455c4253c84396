#!/usr/bin/env bash
#SBATCH --job-name=dlm_jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# One run over all nodes, with one task per node, on GPUs or CPUs. Install once in the
# checkout (bash -c '. launch/setup.sh; setup gpu'), then submit from there:
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config configs/e2e.py --workdir runs/e2e
# A job array is one run per seed, each in its own subfolder of --workdir:
#   sbatch --array=1-3 launch/slurm.sh --config configs/e2e.py --workdir runs/e2e
# When preempted or out of time, the run saves and the job is requeued.
# --dry_run as the first argument prints what would run.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
dry=""
job=${SLURM_JOB_ID:-}
if [ "${1:-}" = --dry_run ]; then
  dry=1
  shift
fi
arguments=("$@")
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  for ((i = 0; i < ${#arguments[@]}; i++)); do
    case ${arguments[i]} in
      --workdir) arguments[i + 1]+="/$SLURM_ARRAY_TASK_ID" ;;
      --workdir=*) arguments[i]+="/$SLURM_ARRAY_TASK_ID" ;;
    esac
  done
  arguments+=("--config.seed=$SLURM_ARRAY_TASK_ID")
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
# A failing task itself ends the others, with one exit status. srun kills those that
# hang after --wait seconds.
command=(srun --kill-on-bad-exit=0 --wait=120 .venv/bin/python -m dlm_jax.main "${arguments[@]}")
if [ -n "$dry" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
status=0
"${command[@]}" || status=$?
if { [ "$status" = 75 ] || [ "$status" -ge 128 ]; } &&
  [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
  echo "ended with status $status: back into the queue" >&2
  scontrol requeue "$job"
fi
exit "$status"
