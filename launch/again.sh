#!/usr/bin/env bash
# Runs a command and restarts it after a preemption; it resumes from its checkpoint.
#   bash launch/again.sh .venv/bin/python -m dlm_jax.main --config ...
# Exit status 75 and death by a signal cause a restart, at most RESTARTS (100) times.
# Any other status is final, also 130 (Ctrl-C). On Google Cloud a maintenance notice is
# made a SIGTERM, upon which the command saves. PYTHON (python3) polls for it.
set -euo pipefail
restarts=${RESTARTS:-100}
url=${METADATA_URL:-http://metadata.google.internal/computeMetadata/v1/instance/maintenance-event}
python=${PYTHON:-python3}
ask='import signal, sys
from urllib.request import ProxyHandler, Request, build_opener
signal.alarm(5)  # also limits the name lookup
request = Request(sys.argv[1], headers={"Metadata-Flavor": "Google"})
print(build_opener(ProxyHandler({})).open(request).read().decode())'

# noticed: succeeds while a maintenance notice is posted, until the maintenance is over
noticed() {
  { notice=$("$python" -I -c "$ask" "$url" || true); } 2>/dev/null
  [[ $notice == MIGRATE* || $notice == TERMINATE* ]]
}

# pause SECONDS: sleeps; a signal ends it early
pause() {
  sleep "$1" &
  wait $! || true
}

# watch_notices PID: sends SIGTERM to the process when a notice is posted
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
  while [ "$told" = 0 ] && noticed; do # do not start during maintenance
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
  while kill -0 "$child" 2>/dev/null; do # a trapped signal ends `wait` early
    status=0
    wait "$child" || status=$?
  done
  kill "$watcher" 2>/dev/null || true
  trap 'told=1' TERM INT
  if [ "$told" = 1 ] || [ "$status" = 130 ] ||
    { [ "$status" != 75 ] && [ "$status" -lt 128 ]; }; then
    exit "$status"
  fi
  echo "ended with status $status: again ($((i + 1)) of $restarts)" >&2
  pause "${AGAIN_SECONDS:-5}"
done
exit "$status"
