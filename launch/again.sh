#!/usr/bin/env bash
# Runs a command, and again when it was preempted or killed, as it then goes on from its
# checkpoint: bash launch/again.sh .venv/bin/python -m dlm_jax.main --config ...
# Status 75 and death by a signal mean again; anything else ends it. RESTARTS bounds it.
# On Google Cloud a maintenance notice becomes a SIGTERM, which the command saves upon;
# PYTHON (python3) asks for it.
set -euo pipefail
restarts=${RESTARTS:-100}
url=${METADATA_URL:-http://metadata.google.internal/computeMetadata/v1/instance/maintenance-event}
python=${PYTHON:-python3}
ask='import signal, sys
from urllib.request import ProxyHandler, Request, build_opener
signal.alarm(5)  # for the name server too
request = Request(sys.argv[1], headers={"Metadata-Flavor": "Google"})
print(build_opener(ProxyHandler({})).open(request).read().decode())'

# noticed: whether there is a notice of maintenance; it stands until that is over
noticed() {
  { notice=$("$python" -I -c "$ask" "$url" || true); } 2>/dev/null
  [[ $notice == MIGRATE* || $notice == TERMINATE* ]]
}

# pause SECONDS: a signal ends it early
pause() {
  sleep "$1" &
  wait $! || true
}

# A notice becomes SIGTERM.
watch_notices() {
  while kill -0 "$1" 2>/dev/null; do
    if noticed; then
      echo "maintenance notice: $notice" >&2
      kill -TERM "$1" 2>/dev/null || true
      return
    fi
    sleep "${NOTICE_SECONDS:-30}"
  done
}

command -v "$python" >/dev/null || echo "no $python: maintenance notices are not seen" >&2
told=0
trap 'told=1' TERM INT
for ((i = 0; i <= restarts; i++)); do
  while [ "$told" = 0 ] && noticed; do # it would be stopped at once
    pause "${NOTICE_SECONDS:-30}"
  done
  [ "$told" = 0 ] || exit 143
  "$@" &
  child=$!
  trap 'told=1; kill -TERM "$child" 2>/dev/null' TERM INT
  watch_notices "$child" &
  watcher=$!
  status=0
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a trap ends `wait` early
    status=0
    wait "$child" || status=$?
  done
  kill "$watcher" 2>/dev/null || true
  trap 'told=1' TERM INT
  if [ "$told" = 1 ] || { [ "$status" != 75 ] && [ "$status" -lt 128 ]; }; then
    exit "$status"
  fi
  echo "ended with status $status: again ($((i + 1)) of $restarts)" >&2
  pause "${AGAIN_SECONDS:-5}"
done
exit "$status"
