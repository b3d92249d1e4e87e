"""The benches behind the documents still run. How fast is not asked here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.slow
def test_training_bench_measures_every_part_of_both_loops() -> None:
    words = ["images=192", "repeats=1", "batch_size=32", "workers=1"]
    command = [sys.executable, str(SCRIPTS / "bench_training.py"), *words]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    rows = [line for line in out.splitlines() if re.match(r"\| (reference|fpgm)", line)]
    assert len(rows) == 5
    for row in rows:
        shares = [float(share) for share in re.findall(r"([\d.]+) %", row)]
        assert len(shares) == 5
        assert 80 < sum(shares) <= 101
