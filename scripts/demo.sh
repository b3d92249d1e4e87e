#!/usr/bin/env bash
# From nothing to a pruned network: makes .venv, installs fpgm, runs the main job on the digits.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --editable .
exec .venv/bin/fpgm-train dataset=digits criterion=gm rate=0.4
