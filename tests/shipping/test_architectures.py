"""Networks are timed by name, before anything is trained, beside what the paper measured."""

from __future__ import annotations

import json
from pathlib import Path

import emulated_gpu
import pytest
import torch
from emulated_gpu import emulate
from torch import nn

import fpgm
from fpgm.compaction.compact import equivalence
from fpgm.errors import ShippingError
from fpgm.networks import models
from fpgm.shipping import architectures
from fpgm.shipping import latency as timing
from fpgm.shipping.architectures import Request, named, pair, published, rates

TINY = ("--batch", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "WARM_UP", 1)


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that does not work."""
    with pytest.raises(SystemExit) as status:
        timing.main(list(words))
    assert status.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_number_is_a_resnet() -> None:
    assert named("resnet18,34, vgg16") == ["resnet18", "resnet34", "vgg16"]
    with pytest.raises(ShippingError, match=r"--arch resnet19: choose from .*resnet18"):
        named("18,19")


def test_one_rate_is_for_all_networks() -> None:
    assert rates(".3", 3) == [0.3, 0.3, 0.3]
    assert rates(".3,.4", 2) == [0.3, 0.4]


def test_published_rows_are_the_papers() -> None:
    """FPGM's table 5, cell by cell."""
    cells = {
        ("resnet18", 0.3): (37.05, 26.77, 27.7, 41.8),
        ("resnet34", 0.3): (63.89, 45.24, 29.2, 41.1),
        ("resnet50", 0.4): (134.57, 83.22, 38.2, 53.5),
        ("resnet101", 0.3): (219.70, 147.45, 32.9, 42.2),
    }
    assert set(architectures.published_times()) == set(cells)
    for (arch, rate), theirs in cells.items():
        there = published(Request(arch, rate))
        assert there is not None
        assert tuple(vars(there).values())[:4] == theirs
        assert "GTX 1080" in there.note
        # 32.92 is printed as 32.9, 27.75 as 27.7
        assert 100 * (1 - theirs[1] / theirs[0]) == pytest.approx(theirs[2], abs=0.06)
    assert published(Request("resnet50", 0.3)) is None


def test_the_papers_reductions_stand_beside_those_of_whole_filters() -> None:
    """ResNet-18 at 30 %: printed 41.8, whole filters 41.4; the image changes neither much."""
    two = pair(Request("resnet18", 0.3, image=64))
    assert two.closed_form == pytest.approx(41.8, abs=0.15)
    assert 100 * (1 - two.macs[1] / two.macs[0]) == pytest.approx(41.4, abs=0.5)
    aligned = pair(Request("resnet20", 0.3, "shared", 8))
    assert aligned.closed_form is None  # the papers prune in another way
    widths = [m.out_channels for m in aligned.small.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)


def test_what_is_timed_is_a_compact_network_with_constants_to_carry() -> None:
    two = pair(Request("resnet20", 0.4))
    zeroed = pair(Request("resnet20", 0.4)).dense
    fpgm.zero_(zeroed, fpgm.select(zeroed, rate=0.4))
    found = equivalence(zeroed, two.small, torch.randn(4, 3, 32, 32))
    assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]
    assert any(name.endswith(".border") for name, _ in two.small.named_buffers())
    assert not two.dense.training
    deep = pair(Request("resnet110", 0.3))
    with torch.inference_mode():
        size = deep.dense(torch.randn(2, 3, 32, 32)).abs().max()
    assert 1e-20 < size < 1e20  # neither denormal nor infinite: both change the time


def test_networks_by_name_are_timed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    words = ["--arch", "20,resnet18", "--rate", ".4,.3", "--image", "32", *TINY]
    timing.main([*words, "--runtimes", "torch", "--out", str(out)])
    printed = capsys.readouterr().out
    assert (out / "latency_table5.md").read_text() == printed
    result = json.loads((out / "latency_table5.json").read_text())
    small, large = result["rows"]
    assert (small["arch"], small["rate"], small["batch"]) == ("resnet20", 0.4, 2)
    assert small["published"] is None
    assert large["published"]["baseline_ms"] == 37.05
    assert small["macs"]["dense"] == fpgm.cost(fpgm.model("resnet20"), (3, 32, 32)).macs
    for row in result["rows"]:
        share = 100 * (1 - row["compact_ms"] / row["dense_ms"])
        assert row["realised_reduction"] == pytest.approx(share)
        assert f"| {row['dense_ms']:.2f} | {row['compact_ms']:.2f} |" in printed
    assert "| 37.05 | 26.77 | 27.7 | 41.8 |" in printed
    assert "GTX 1080" in printed


def test_a_network_that_is_published_at_another_rate_says_which(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--arch", "18", "--rate", ".5", "--image", "32", "--runtimes", "torch", *TINY]
    timing.main(words)
    assert "resnet18 is published at --rate 0.3." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # nothing is written unless asked for


def test_a_network_for_another_size_is_not_offered_the_one_it_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Rigid(nn.Sequential):
        def __init__(self, num_classes: int, in_channels: int) -> None:
            super().__init__(nn.Conv2d(in_channels, 8, 5), nn.Flatten())
            self.append(nn.Linear(8 * 24 * 24, num_classes))

    monkeypatch.setitem(models.MODELS, "rigid", Rigid)
    with pytest.raises(ShippingError, match=r"--image 32: rigid .* try --image with the size"):
        pair(Request("rigid", 0.3))
    assert pair(Request("rigid", 0.3, image=28)).macs[0] == 8 * 75 * 576 + 8 * 576 * 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a run directory, as in fpgm-latency outputs/my_run, or networks by name"),
        (["r", "--arch", "20"], "r and --arch 20: one of them"),
        (["r", "--rate", ".3"], "--rate .3: only with --arch"),
        (["r", "--out", "x"], "--out x: only with --arch"),
        (["--arch", "19"], "--arch resnet19: choose from"),
        (["--arch", "20", "--rate", "1"], "--rate 1: must be above 0 and below 1"),
        (["--arch", "20", "--rate", "nan"], "--rate nan: must be above 0 and below 1"),
        (["--arch", "20", "--rate", "a"], "--rate a: numbers with commas"),
        (["--arch", "20,32,44", "--rate", ".3,.4"], "2 rates for 3 networks"),
        (["--arch", "20", "--align", "0"], "--align 0: must be at least 1"),
        (["--arch", "vgg16", "--image", "8"], "--image 8: vgg16 does not take it"),
        (["--arch", "20", "--batch", "0"], "--batch 0: whole numbers"),
        (["--arch", "20", "--device", "cuda"], "--device cuda: torch sees no GPU here"),
        (
            ["--arch", "20", "--device", "cuda", "--runtimes", "openvino"],
            "--runtimes openvino: on a GPU only torch",
        ),
    ],
)
def test_bad_words_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failing(capsys, *words)


def test_on_a_gpu_the_clock_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every call lies between two synchronisations, on tensors that are all there."""
    calls: list[str] = []
    forward = nn.Linear.forward

    def seen(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if type(x) is emulated_gpu.OnGpu:
            calls.append("run")
        return forward(self, x)

    about = timing.environment
    monkeypatch.setattr(nn.Linear, "forward", seen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("wait"))
    monkeypatch.setattr(
        timing, "environment", lambda _, dtype: about(torch.device("cpu"), dtype) | {
            "device": "cuda", "precision": "float32, convolutions in TF32", "processor": "H100"
        },
    )  # fmt: skip
    with emulate(monkeypatch):
        timing.main(["--arch", "20", "--rate", ".3", "--device", "cuda", *TINY])
    assert calls == ["wait", "run", "wait"] * (len(calls) // 3)
    assert len(calls) >= 3 * 2 * 11  # two networks, a warm-up and ten rounds
    printed = capsys.readouterr().out
    assert "float32, convolutions in TF32, weights at random; H100, torch" in printed
    assert "| torch | 2 |" in printed
