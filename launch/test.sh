#!/usr/bin/env bash
# Runs lint, type checks and tests in .venv, which it makes. Arguments go to pytest.
. "$(dirname "$0")/setup.sh"
setup test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
.venv/bin/python -m pytest "$@"
