#!/usr/bin/env bash
# Installs the package on a machine with GPUs and runs the command. After a preemption
# the command is restarted. --dry_run prints what would run.
#   bash launch/gpu.sh [--dry_run] --config configs/e2e.py --workdir runs/e2e ...
# On each of several machines, add
#   --coordinator HOST:PORT --num_processes N --process_id I
. "$(dirname "$0")/setup.sh"
command=(bash launch/again.sh .venv/bin/python -m dlm_jax.main)
if [ "${1:-}" = --dry_run ]; then
  shift
  printf '%q ' setup gpu '&&' "${command[@]}" "$@"
  echo
  exit
fi
setup gpu
exec "${command[@]}" "$@"
