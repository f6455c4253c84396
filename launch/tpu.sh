# shellcheck shell=bash disable=SC2016 # single-quoted text is expanded on the TPU
# Sourced by tpu_vm.sh and tpu_pod.sh, which define how a TPU is created and deleted.
#
#   bash launch/tpu_pod.sh ACTION NAME [flags of gcloud] [-- arguments of dlm_jax.main]
#
# create   requests the TPU, unless it exists     TYPE=v5p-32 RUNTIME=... SPOT=1
# setup    copies this commit to every worker and installs it
# start    starts the run, of the arguments after --, on every worker, unless it runs
# logs     follows the first worker's output (WORKER=all: the last lines of all workers)
# status   prints whether the TPU exists and the run is alive
# stop     sends SIGTERM to the run, which then saves and exits
# run      create, setup, start, logs
# delete   deletes the TPU
#
# --dry_run as the first argument prints the commands. ZONE and PROJECT set gcloud's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=
if [ "${1:-}" = --dry_run ]; then
  dry=1
  shift
fi
if [ $# -lt 2 ]; then
  sed -n '/^#   bash/,/^# --dry_run/s/^# \{0,1\}//p' launch/tpu.sh >&2
  exit 2
fi
action=$1 name=$2
shift 2
flags=() arguments=()
while [ $# -gt 0 ]; do
  if [ "$1" = -- ]; then
    shift
    arguments=("$@")
    break
  fi
  flags+=("$1")
  shift
done
[ -z "${ZONE:-}" ] || flags+=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || flags+=("--project=$PROJECT")

# call ARGUMENTS: calls gcloud, or prints the call under --dry_run
call() {
  if [ -n "$dry" ]; then
    printf '%q ' gcloud "$@"
    echo
  else
    gcloud "$@"
  fi
}

# remote WORKER COMMAND: runs the command on that worker
remote() {
  call compute tpus tpu-vm ssh "$name" "--worker=$1" "${flags[@]}" "--command=$2"
}

# there KIND: succeeds if the resource exists
there() {
  [ -z "$dry" ] && gcloud compute tpus "$1" describe "$name" "${flags[@]}" >/dev/null 2>&1
}

# gone KIND: succeeds if the resource does not exist, and says so
gone() {
  [ -z "$dry" ] && ! there "$1" && echo "$name is gone"
}

install() {
  local archive
  archive=$(mktemp -d)/dlm_jax.tar.gz
  if [ -z "$dry" ]; then
    command -v git >/dev/null || {
      echo "error: git, which packs what is sent, is not there: install it" >&2
      exit 2
    }
    git archive --format=tar.gz --output="$archive" HEAD
  fi
  call compute tpus tpu-vm scp "$archive" "$name:dlm_jax.tar.gz" --worker=all "${flags[@]}"
  rm -r "$(dirname "$archive")"
  # the Python of these images is older than 3.11
  remote all 'set -e
command -v python3.11 >/dev/null || {
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get update -qq
  sudo apt-get install -y -qq python3.11 python3.11-venv
}
mkdir -p dlm_jax && tar -xzf dlm_jax.tar.gz -C dlm_jax && cd dlm_jax
PYTHON=python3.11 bash -c ". launch/setup.sh; setup tpu"'
}

start() {
  local line
  if [ ${#arguments[@]} = 0 ]; then
    echo "error: start: give the command after --, such as -- --config configs/e2e.py --workdir gs://BUCKET/e2e" >&2
    exit 2
  fi
  line=$(printf '%q ' bash launch/again.sh .venv/bin/python -m dlm_jax.main "${arguments[@]}")
  remote all "cd dlm_jax
if [ -f run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then echo 'runs already'; exit; fi
nohup setsid $line >> run.log 2>&1 < /dev/null & echo \$! > run.pid"
}

logs() {
  if [ "${WORKER:-0}" = all ]; then
    remote all 'tail -n 20 dlm_jax/run.log'
  else
    remote "${WORKER:-0}" 'tail -n 100 -F dlm_jax/run.log'
  fi
}

main() {
  case $action in
    create) create ;;
    setup) install ;;
    start) start ;;
    logs) logs ;;
    status)
      describe
      remote all 'kill -0 $(cat dlm_jax/run.pid) 2>/dev/null && echo runs || echo ended; tail -n 1 dlm_jax/run.log'
      ;;
    stop) remote all 'kill -TERM $(cat dlm_jax/run.pid) 2>/dev/null || echo "ended already"' ;;
    run)
      create
      install
      start
      logs
      ;;
    delete) delete ;;
    *)
      echo "error: $action: choose create, setup, start, logs, status, stop, run or delete" >&2
      exit 2
      ;;
  esac
}
