#!/usr/bin/env bash
# Lint, types and tests, in an environment of their own making. Arguments go to pytest.
. "$(dirname "$0")/setup.sh"
setup test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
.venv/bin/python -m pytest "$@"
