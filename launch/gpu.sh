#!/usr/bin/env bash
# One machine with GPUs: set-up, then the command, again after a preemption.
#   bash launch/gpu.sh [--dry_run] --config configs/e2e.py --workdir runs/e2e ...
# Several machines: add --coordinator HOST:PORT --num_processes N --process_id I on each.
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
