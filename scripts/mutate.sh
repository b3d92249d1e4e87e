#!/usr/bin/env bash
# Small faults put into the code one at a time: which do the tests of the same room notice?
#   bash scripts/mutate.sh                    40 in each room
#   bash scripts/mutate.sh selection 100      100 in one
# SEED=1 draws others, JOBS=4 runs more at once, PYTHON= takes another environment than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    [ -x $PYTHON ] || python3 -m venv .venv
    $PYTHON -m pip install --quiet --editable '.[dev,mutation]'
fi
# No bytecode: a mutant may be as old and as long as the original.
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" scripts/mutate.py "$@"
