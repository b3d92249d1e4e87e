"""A compact network in another form is the same function, and none slower than dense is shipped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import random_keep, randomised

import fpgm
from fpgm.compaction.ballast import rounded, streams, widened
from fpgm.compaction.compact import compact, load
from fpgm.errors import ShippingError
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.networks.layers import BorderConv2d, Expand
from fpgm.runs.checkpoint import write
from fpgm.shipping import tuning


def pruned(residual: str):
    model = randomised(fpgm.model("resnet20"), 0, torch.float64)
    keep = random_keep(model, 0.5, 0, residual)
    fpgm.zero_(model, keep)
    return model, keep


def expands(network: nn.Module) -> int:
    return sum(isinstance(module, Expand) for module in network.modules())


def maps(network: nn.Module) -> int:
    borders = [m.border for m in network.modules() if isinstance(m, BorderConv2d)]
    return sum(border is not None for border in borders)


def test_a_tuned_network_loads_again(tmp_path: Path) -> None:
    arch = {"name": "resnet20", "num_classes": 10, "in_channels": 3}
    model = randomised(fpgm.model(**arch), 0)
    keep = fpgm.select(model, "random", 0.5)
    fpgm.zero_(model, keep)
    graph = trace(model)
    ballast = widened(graph, keep, {}, streams(graph, keep))
    ballast = rounded(graph, keep, ballast, prunable(graph).groups, 4)
    small = compact(model, keep, ballast)
    saved = {"arch": arch, "keep": keep, "ballast": ballast, "state_dict": small.state_dict()}
    write(tmp_path / "compact.pt", saved)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / "compact.pt")(x), small(x))


class Clock:
    """Stands for a runtime: a network takes as long as `price` says."""

    def __init__(self, price) -> None:
        self.price = price

    def __call__(self, network: nn.Module, image: tuple[int, int, int], threads: int):
        return lambda batch: self.price(network)

    def side_by_side(self, runners, batch):
        return [[run(batch)] * 3 for run in runners]


@pytest.mark.parametrize(
    ("price", "form"),
    [
        (lambda n: fpgm.cost(n, (3, 32, 32)).macs, "as cut"),
        (lambda n: 1 + expands(n), "all adds widened"),
        (lambda n: 1 + expands(n) + maps(n), "all adds widened, widths to 1"),
        (lambda n: 1 / fpgm.cost(n, (3, 32, 32)).macs, "full width"),
    ],
)
def test_the_fastest_form_is_chosen(monkeypatch: pytest.MonkeyPatch, price, form: str) -> None:
    model, keep = pruned("independent")
    clock = Clock(price)
    monkeypatch.setitem(tuning.TARGETS, "torch", clock)
    monkeypatch.setattr(tuning, "side_by_side", clock.side_by_side)
    tuned = tuning.tune(model, keep, tuning.Target("torch", (3, 32, 32), 2, 1))
    assert tuned.form == form
    times = {row["form"]: row["ms"] for row in tuned.rows if row["round"] == 2}
    assert times[tuned.form] <= times["full width"] / tuning.WORTH
    assert 1e3 * price(compact(model, keep, tuned.ballast)) == times[form]


def test_a_run_ships_the_form_that_is_fastest(tmp_path: Path) -> None:
    from commands import report, run

    words = ["dataset=digits", "epochs=1", "rate=0.4", "tune=true", "target_batch=16"]
    status, out, err = run(tmp_path, *words, "hydra.run.dir=r")
    assert status == 0, err
    assert "tuned for torch, batch 16" in out + err
    r = report(tmp_path / "r")
    assert r["equivalence"]["agreement"] == 1
    chosen = [row for row in r["tuning"]["tried"] if row["form"] == r["tuning"]["form"]][-1]
    assert chosen["macs"] == r["compact"]["macs"]
    assert r["pruning"]["pruned_filters"] == 264  # what was pruned, however it is shipped
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == r


def test_missing_runtime_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpgm.shipping import runtimes

    monkeypatch.setattr(runtimes, "installed", lambda name: False)
    with pytest.raises(ShippingError, match=r"target=openvino: .*pip install"):
        runtimes.require("openvino")


def test_a_target_in_int8_needs_what_makes_it_and_times_the_network_in_int8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnx = pytest.importorskip("onnx")
    from fpgm.shipping import runtimes

    made = []
    monkeypatch.setitem(runtimes.ONNX, "onnxruntime", lambda model, *_: made.append(model))
    runtimes.TARGETS["onnxruntime_int8"](fpgm.model("resnet20"), (3, 32, 32), 1)
    run = [node.op_type for node in onnx.load_from_string(made[0]).graph.node]
    assert run.count("QuantizeLinear") > run.count("Conv")
    monkeypatch.setattr(runtimes, "installed", lambda name: name == "openvino")
    with pytest.raises(ShippingError, match="target=openvino_int8: onnxruntime is not installed"):
        runtimes.require("openvino_int8")


def test_a_run_that_cannot_be_tuned_is_shipped_as_cut_and_says_so(tmp_path: Path) -> None:
    from commands import report, run

    words = ["dataset=digits", "epochs=1", "rate=0.4", "tune=true", f"target_batch={10**12}"]
    status, out, err = run(tmp_path, *words, "hydra.run.dir=r")
    assert status == 0, err
    r = report(tmp_path / "r")
    assert r["tuning"] is None
    assert any("not tuned" in line and "target_batch" in line for line in r["warnings"])
    assert "not tuned" in out + err
    assert r["compact"]["macs"] < 0.5 * r["dense"]["macs"]


def test_too_large_a_batch_is_named() -> None:
    model, keep = pruned("inner")
    target = tuning.Target("torch", (3, 32, 32), 10**12, 1)
    with pytest.raises(ShippingError, match=r"target_batch=10{12}: torch cannot run it"):
        tuning.tune(model, keep, target)


def crash(*_: object) -> None:
    os._exit(11)


def test_a_runtime_that_crashes_does_not_take_the_network_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, keep = pruned("inner")
    monkeypatch.setattr(tuning, "tune", crash)
    target = tuning.Target("openvino", (3, 32, 32), 1, 1)
    with pytest.raises(ShippingError, match="target=openvino: it crashed"):
        tuning.tune_apart(model, keep, target, prunable(trace(model), "inner").groups)
