#!/usr/bin/env bash
# What a change must pass, in minutes: formatting, lint, types and the tests that are not slow.
# Makes .venv if needed. Arguments go to pytest: bash scripts/test.sh tests/graph
# .ci/run runs the slow ones and the launchers' as well.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[dev]'
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
# Two workers of one thread each (tests/conftest.py): a small network gains nothing from more.
.venv/bin/pytest -n 2 --dist worksteal "$@"
