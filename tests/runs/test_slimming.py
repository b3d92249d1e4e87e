"""Network Slimming as one command: sparse training, one cut over the network, fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import report, run_apart

ROWS = (
    "[{rate: 0, method: slimming, method.slimming.strength: 0.001},"
    "{criterion: bn_gamma, schedule: hard, scope: global, scope_norm: none, rate: 0.4,"
    " pretrained: baseline+slimming}]"
)


@pytest.mark.slow
def test_a_grid_trains_sparsely_first_and_cuts_that_network(tmp_path: Path) -> None:
    words = ("experiment=slimming", "dataset=digits", "device=cpu", "precision=float32", "epochs=2")
    status, _, err = run_apart(tmp_path, *words, f"hydra.sweeper.rows={ROWS}")
    assert status == 0, err
    sparse, cut = sorted(
        (report(path.parent) for path in tmp_path.rglob("report.json")),
        key=lambda done: done["config"]["rate"],
    )
    assert list(sparse["config"]["method"]) == ["slimming"]
    assert sparse["pruning"]["pruned_filters"] == 0
    assert cut["pruning"]["pruned_filters"] > 0
    assert cut["config"]["pretrained"] is not None
    kept = {layer["kept"] / layer["filters"] for layer in cut["layers"] if layer["name"] != "fc"}
    assert len(kept) > 2  # one threshold over the network, and no rate of every layer
    same = cut["equivalence"]
    assert same["max_abs_diff"] <= 1e-5 * same["max_abs_logit"]
