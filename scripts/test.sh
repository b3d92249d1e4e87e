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
exec .venv/bin/pytest "$@"
