#!/usr/bin/env bash
# Everything a change must pass: formatting, lint, types and all tests. Makes .venv if needed.
# Arguments go to pytest: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[dev]'
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/pytest "$@"
# Hydra loads every launcher that is installed, at each start: last, and only for a run of everything.
if [ $# -eq 0 ]; then
    .venv/bin/python -m pip install --quiet --editable '.[joblib,submitit]'
    .venv/bin/pytest tests/cli/test_launchers.py
fi
