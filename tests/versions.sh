#!/usr/bin/env bash
# The suite against the lowest and the newest versions of what setup.cfg asks for:
#   bash tests/versions.sh lowest [pytest's arguments]
#   bash tests/versions.sh newest [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-}
case $which in
  lowest | newest) shift ;;
  *)
    echo "error: choose lowest or newest" >&2
    exit 2
    ;;
esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
options=(--upgrade)
if [ "$which" = lowest ]; then
  # install_requires alone: its bounds as pins; the tools of the tests may be new
  sed -n '/^install_requires/,/^\[/s/^ \{4\}\([a-zA-Z_-]*\)\(\[[a-z]*\]\)\{0,1\}>=\([0-9.]*\).*/\1==\3/p' setup.cfg > "$folder/pins"
  cat "$folder/pins"
  options=(--constraint "$folder/pins")
fi
"$folder/venv/bin/python" -m pip install --quiet "${options[@]}" -e ".[test]"
"$folder/venv/bin/python" -m pip list 2>/dev/null | grep -iE '^(jax|jaxlib|flax|optax|orbax-checkpoint|numpy|tensorflow-datasets) '
"$folder/venv/bin/python" -m pytest "$@"
