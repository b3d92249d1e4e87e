"""The network leaves Python unchanged, and its milliseconds are measured, not promised."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import Odd, zeroed

import fpgm
from fpgm.compaction.compact import compact, equivalence
from fpgm.data import sets
from fpgm.errors import ShippingError
from fpgm.runs import checkpoint
from fpgm.shipping import export as exporting
from fpgm.shipping import latency as timing
from fpgm.shipping.folding import fold
from fpgm.shipping.latency import markdown, measure, side_by_side

IMAGE = (1, 8, 8)


def apart(function, *arguments):
    """In a process of its own: OpenVINO is known to corrupt the heap (see tuning.tune_apart)."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run on the digits leaves, with every BatchNorm drawn at random."""
    directory = tmp_path_factory.mktemp("run")
    arch = {"name": "resnet20", "num_classes": 10, "in_channels": 1}
    model, keep = zeroed(0, 0.4, fpgm.model(**arch))
    digits = sets.load(torch.device("cpu"), name="digits").preprocessing()
    shared = {"arch": arch, "keep": keep, "preprocessing": digits}
    for name, network in (("zeroed.pt", model), ("compact.pt", compact(model, keep))):
        checkpoint.write(directory / name, {**shared, "state_dict": network.state_dict()})
    (directory / "report.json").write_text("{}")
    from commands import compose

    (directory / "config.yaml").write_text(json.dumps(compose("dataset=digits")))
    return directory


@pytest.mark.parametrize("network", [lambda: fpgm.model("resnet20"), Odd], ids=["resnet20", "odd"])
def test_folding_batchnorm_changes_no_output(network) -> None:
    model, keep = zeroed(0, 0.4, network(), torch.float64)
    x = torch.randn(2, 3, 47, 52, dtype=torch.float64)
    for original in (model, compact(model, keep)):
        folded = fold(original)
        found = equivalence(original, folded, x)
        assert found["max_abs_diff"] <= 1e-12 * found["max_abs_logit"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fold(fpgm.model("resnet20")).modules())


@pytest.mark.parametrize(
    ("kind", "dynamic"), [("onnx", True), ("onnx", False), ("pt2", True)], ids=str
)
def test_exported_network_gives_the_same_answers(
    run_directory: Path, kind: str, dynamic: bool
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    path, found = exporting.export_run(run_directory, kind, dynamic)
    assert path.exists()
    assert found["images"] == 256
    assert found["max_abs_diff"] <= 1e-4 * found["max_abs_logit"]


def test_export_of_a_wrong_network_is_noticed(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporting.run_exported
    monkeypatch.setattr(exporting, "run_exported", lambda *args: right(*args) * 1.01)
    with pytest.raises(ShippingError, match="differs from the torch network"):
        exporting.export_run(run_directory, "pt2", True)
    assert not (run_directory / "compact.pt2").exists()


def test_unfinished_run_is_not_exported_or_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main in (exporting.main, timing.main):
        with pytest.raises(SystemExit) as status:
            main([str(tmp_path)])
        assert status.value.code == 1
        assert "that run is not done" in capsys.readouterr().err


def test_latency_is_written_beside_the_run(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timing.main([str(run_directory), "--runtimes", "torch", "--batch", "1,4", "--threads", "1"])
    result = json.loads((run_directory / "latency.json").read_text())
    assert [(row["runtime"], row["batch"]) for row in result["rows"]] == [
        ("torch", 1),
        ("torch", 4),
    ]
    for row in result["rows"]:
        low, high = row["quartiles"]["dense_ms"]
        assert 0 < low <= row["dense_ms"] <= high
        assert row["speed_up"] == row["dense_ms"] / row["compact_ms"]
    assert (run_directory / "latency.md").read_text() == capsys.readouterr().out


@pytest.mark.slow
def test_every_runtime_there_is_can_be_timed() -> None:
    model, keep = zeroed(0, 0.5, fpgm.model("resnet20", in_channels=1))
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
    runtimes = ["onnxruntime", "openvino"]
    rows = apart(measure, model, compact(model, keep), IMAGE, runtimes, [1, 3], 1)
    assert [(row["runtime"], row["batch"]) for row in rows] == [
        ("onnxruntime", 1), ("onnxruntime", 3), ("openvino", 1), ("openvino", 3),
    ]  # fmt: skip
    assert "| openvino | 3 |" in markdown(
        {
            "rows": rows,
            "macs": {"dense": 2, "compact": 1, "ratio": 2.0},
            "threads": 1,
            "environment": {"processor": "", "torch": ""},
        }
    )


def test_a_batch_too_large_for_the_memory_is_named() -> None:
    model = fpgm.model("resnet20", in_channels=1)
    with pytest.raises(ShippingError, match=r"--batch 10{12}: torch cannot run it .*memory"):
        measure(model, model, IMAGE, ["torch"], [10**12], 1)


def test_runners_take_turns() -> None:
    calls: list[str] = []
    runners = [lambda batch: calls.append("a"), lambda batch: calls.append("b")]
    seconds = side_by_side(runners, torch.zeros(1))
    assert "".join(calls) == "ab" * (len(calls) // 2)
    assert len(seconds[0]) == len(seconds[1]) >= 10


def test_missing_runtime_is_left_out_with_the_command_that_installs_it(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "installed", lambda name: name == "torch")
    timing.main([str(run_directory), "--runtimes", "torch,openvino", "--batch", "1"])
    err = capsys.readouterr().err
    assert "openvino is not installed and is left out: pip install 'fpgm[latency]'" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runtimes", "tvm"], "--runtimes tvm: choose from torch, onnxruntime, openvino"),
        (["--batch", "0"], "--batch 0: whole numbers with commas"),
        (["--batch", "a"], "--batch a: whole numbers with commas"),
    ],
)
def test_bad_words_are_named(
    run_directory: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        timing.main([str(run_directory), *words])
    assert message in capsys.readouterr().err
