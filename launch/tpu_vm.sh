#!/usr/bin/env bash
# Runs on a TPU VM that is created directly; launch/tpu.sh lists the actions.
#   TYPE=v5litepod-8 ZONE=us-west4-a bash launch/tpu_vm.sh run mine -- --config configs/e2e.py --workdir runs/e2e
. "$(dirname "$0")/tpu.sh" "$@"

describe() { call compute tpus tpu-vm describe "$name" "${flags[@]}" '--format=value(state)'; }

create() {
  if there tpu-vm; then
    echo "$name is there"
    return
  fi
  call compute tpus tpu-vm create "$name" "--accelerator-type=${TYPE:-v5litepod-8}" \
    "--version=${RUNTIME:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot} "${flags[@]}"
}

delete() {
  gone tpu-vm || call compute tpus tpu-vm delete "$name" --quiet "${flags[@]}"
}

main
