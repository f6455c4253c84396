# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv, again if the package's settings changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local name
  for name in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
    if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or newer on PATH; install one or set PYTHON=" >&2
  return 2
}

# setup [EXTRA]: makes .venv and installs the package with the extra
setup() {
  local extra=${1:-} python stamp wanted
  stamp=.venv/installed${extra:+-$extra}
  wanted=$(cat setup.cfg pyproject.toml | cksum)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python=$(find_python)
  if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || {
      rm -rf .venv
      echo "error: $python cannot make a virtual environment; on Debian: apt install python3-venv" >&2
      return 2
    }
  fi
  echo "installing dlm_jax${extra:+[$extra]} into .venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
  echo "$wanted" > "$stamp"
}
