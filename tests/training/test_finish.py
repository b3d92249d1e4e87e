"""What is shipped is proven equal: a mistake ends the run, rounding does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import few, whole

from fpgm.errors import Error
from fpgm.training import finish as delivery

__all__ = ["few"]  # a fixture
pytestmark = pytest.mark.usefixtures("few")


def digits(tmp_path: Path) -> dict[str, Any]:
    return whole(tmp_path, "epochs=1")


def test_rounding_above_the_limit_is_said_and_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "FLOAT32", 0.0)
    report = digits(tmp_path)
    assert report["status"] == "done"
    (said,) = [line for line in report["warnings"] if line.startswith("the compact network")]
    assert "in float32, more than 0 of" in said
    assert said.endswith("in float64")
    assert "rounding" in said


@pytest.mark.parametrize("mistake", [1e-3, float("nan")])
def test_a_mistake_in_the_compact_network_ends_the_run_and_keeps_both_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: float
) -> None:
    right = delivery.built

    def wrong(*arguments: Any) -> torch.nn.Module:
        small = right(*arguments)
        torch.nn.init.constant_(small.fc.bias, mistake)
        return small

    monkeypatch.setattr(delivery, "built", wrong)
    with pytest.raises(Error, match="in float64: no report; both networks are kept in"):
        digits(tmp_path)
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "zeroed.pt").exists()
    assert (tmp_path / "compact.pt").exists()
