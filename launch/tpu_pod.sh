#!/usr/bin/env bash
# Runs on a multi-host TPU slice as a queued resource; launch/tpu.sh lists the actions.
#   TYPE=v5p-32 ZONE=us-east5-a SPOT=1 bash launch/tpu_pod.sh run mine -- --config configs/e2e.py --workdir gs://BUCKET/e2e
# After a spot slice is preempted: delete, then run; the run resumes from its bucket.
. "$(dirname "$0")/tpu.sh" "$@"

describe() { call compute tpus queued-resources describe "$name" "${flags[@]}" '--format=value(state.state)'; }

create() {
  if there queued-resources; then
    echo "$name is asked for"
  else
    call compute tpus queued-resources create "$name" "--node-id=$name" \
      "--accelerator-type=${TYPE:-v5p-32}" "--runtime-version=${RUNTIME:-v2-alpha-tpuv5}" \
      ${SPOT:+--spot} "--valid-until-duration=${PATIENCE:-24h}" "${flags[@]}"
  fi
  [ -n "$dry" ] || wait_until_active
}

wait_until_active() {
  local state
  while true; do
    state=$(describe)
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        echo "error: $name is $state; delete it and create it again" >&2
        exit 1
        ;;
    esac
    echo "$name is ${state:-unknown}"
    sleep "${WAIT_SECONDS:-30}"
  done
}

delete() {
  gone queued-resources ||
    call compute tpus queued-resources delete "$name" --force --quiet "${flags[@]}"
}

main
