#!/usr/bin/env bash
# The suite against other versions than those at hand:
#   bash tests/versions.sh lowest [pytest's arguments]   the lowest that setup.cfg asks for
#   bash tests/versions.sh newest [pytest's arguments]   the newest that it allows
#   bash tests/versions.sh trixie [pytest's arguments]   Python 3.13 and nothing else: the
#     README's test command on what is committed, in a bare Debian 13 in a folder. As root,
#     with Debian's package debootstrap. FOLDER= names a folder that is kept for the next
#     time, MIRROR= another source than Debian's own.
set -euo pipefail
cd "$(dirname "$0")/.."

# installed WHICH [ARGUMENTS]: an environment with the lowest or the newest versions
installed() {
  local which=$1 options=(--upgrade)
  shift
  "${PYTHON:-python3}" -m venv "$folder/venv"
  if [ "$which" = lowest ]; then
    # install_requires alone: its bounds as pins; the tools of the tests may be new
    sed -n '/^install_requires/,/^\[/s/^ \{4\}\([a-zA-Z_-]*\)\(\[[a-z]*\]\)\{0,1\}>=\([0-9.]*\).*/\1==\3/p' setup.cfg > "$folder/pins"
    cat "$folder/pins"
    options=(--constraint "$folder/pins")
  fi
  "$folder/venv/bin/python" -m pip install --quiet "${options[@]}" -e ".[test]"
  "$folder/venv/bin/python" -m pip list 2>/dev/null | grep -iE '^(jax|jaxlib|flax|optax|orbax-checkpoint|numpy|tensorflow-datasets) '
  "$folder/venv/bin/python" -m pytest "$@"
}

# settle: what the Debian in the folder needs to reach pip's index as this machine does
settle() {
  local at
  cp -L /etc/resolv.conf "$folder/etc/resolv.conf"
  echo "127.0.0.1 localhost $(hostname)" > "$folder/etc/hosts"
  mkdir -p "$folder/etc/ssl/certs"
  cp -L "${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}" "$folder$bundle"
  for at in /etc/pip.conf /etc/xdg/pip ~/.config/pip; do
    [ -e "$at" ] || continue
    mkdir -p "$folder$(dirname "${at/#$HOME/\/root}")"
    cp -rLT "$at" "$folder${at/#$HOME/\/root}"
  done
}

# bare [ARGUMENTS]: the test command in a bare Debian. Its mounts and processes are in
# namespaces of their own, so they end with it, however it ends.
bare() {
  local bundle=/etc/ssl/certs/ca-certificates.crt name own=()
  if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
    echo "error: trixie needs root and debootstrap: apt-get install debootstrap" >&2
    exit 2
  fi
  if [ ! -e "$folder/etc/debian_version" ] || [ -e "$folder/debootstrap" ]; then # begun
    debootstrap --variant=minbase --include=python3,python3-venv trixie "$folder" \
      "${MIRROR:-http://deb.debian.org/debian}"
  fi
  settle
  [ -e "$folder/root/dlm_jax" ] || git clone --quiet . "$folder/root/dlm_jax"
  git -C "$folder/root/dlm_jax" fetch --quiet "$PWD" HEAD
  git -C "$folder/root/dlm_jax" reset --quiet --hard FETCH_HEAD
  for name in $(compgen -e | grep -iE '^pip_|_proxy$'); do
    own+=("$name=${!name}")
  done
  # shellcheck disable=SC2016 # it is for the inner shell
  unshare --mount --pid --fork --kill-child bash -euc '
    mount -t proc proc "$0/proc"
    mount --rbind /dev "$0/dev"
    exec chroot "$0" env --ignore-environment --chdir=/root/dlm_jax "$@"
  ' "$folder" HOME=/root LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin \
    "${own[@]}" PIP_CERT="$bundle" bash launch/test.sh "$@"
}

which=${1:-}
case $which in
  lowest | newest | trixie) shift ;;
  *)
    echo "error: choose lowest, newest or trixie" >&2
    exit 2
    ;;
esac
folder=${FOLDER:-$(mktemp -d)}
[ -n "${FOLDER:-}" ] || trap 'rm -rf "$folder"' EXIT
case $which in
  trixie) bare "$@" ;;
  *) installed "$which" "$@" ;;
esac
