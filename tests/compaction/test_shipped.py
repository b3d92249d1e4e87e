"""What is built on a compact network can be read again, by names, shapes and indices alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from own_networks import averaged, resnet8
from tasks import cut_short, few, whole
from torch import nn

import fpgm
from fpgm.cli.compress import main as compress
from fpgm.networks.layers import BorderConv2d
from fpgm.runs import checkpoint

__all__ = ["few"]  # a fixture
pytestmark = pytest.mark.usefixtures("few")

OWN = ("arch=own", "schedule=hard", "epochs=1")
INNER = ("rate=0.4", "residual=inner")
AGAIN = ("arch=compact", "epochs=1", "optimizer=finetune")


def started(where: Path, network: nn.Module) -> str:
    """Weights to start from, whose BatchNorms emit constants, some that a ReLU cuts off."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    torch.save(network.state_dict(), where)
    return f"pretrained={where}"


@pytest.fixture
def bordered(tmp_path: Path) -> Path:
    """A finished run whose compact network has constants at the borders."""
    start = started(tmp_path / "w.pt", resnet8(10, 1))
    whole(tmp_path / "run", *OWN, "arch.build=own_networks:resnet8", *INNER, start)
    layers = fpgm.load(tmp_path / "run").modules()
    assert any(isinstance(m, BorderConv2d) and m.border is not None for m in layers)
    return tmp_path / "run"


def same(directory: Path) -> bool:
    """Whether what is read holds what was written."""
    written = checkpoint.read(directory / "compact.pt")["state_dict"]
    read = fpgm.load(directory).state_dict()
    return written.keys() == read.keys() and all(
        torch.equal(read[name], value) for name, value in written.items()
    )


def test_a_compact_network_that_is_pruned_again_is_read(tmp_path: Path) -> None:
    start = started(tmp_path / "w.pt", fpgm.model("resnet20", in_channels=1))
    part = ("rate=0.4", "residual=inner", "ignore=[layer1.*,layer2.*]")
    whole(tmp_path / "a", "schedule=hard", "epochs=1", *part, start)
    words = ("schedule=hard", *INNER, f"pretrained={tmp_path / 'a'}")
    report = whole(tmp_path / "b", *AGAIN, *words)
    assert report["equivalence"]["agreement"] == 1
    assert report["compact"]["macs"] < report["dense"]["macs"]
    assert same(tmp_path / "b")


def test_a_compact_network_that_is_trained_on_is_compressed_and_trained_on(
    bordered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(tmp_path / "b", *AGAIN, "rate=0", f"pretrained={bordered}")
    compress([str(tmp_path / "b"), "--decompose", "zhang", "--macs-target", "0.8"])
    said = capsys.readouterr().out
    assert "left as they are: " in said
    assert "as many MACs" not in said  # they were not chosen, which is all that is known
    assert same(tmp_path / "b" / "zhang")
    whole(tmp_path / "c", *AGAIN, "rate=0", f"pretrained={tmp_path / 'b' / 'zhang'}")
    assert same(tmp_path / "c")


def test_channels_that_an_average_over_padding_needs_are_written_down(tmp_path: Path) -> None:
    """Which they are is decided by what the constants are, of which a file's reader knows none."""
    start = started(tmp_path / "w.pt", averaged(10, 1))
    whole(tmp_path / "a", *OWN, "arch.build=own_networks:averaged", "rate=0.5", start)
    saved = checkpoint.read(tmp_path / "a" / "compact.pt")
    (live,) = saved["decided"].values()
    kept = len(saved["keep"]["0"])
    assert kept < len(live) < 12  # some constants are zero behind the ReLU, and some are not
    assert same(tmp_path / "a")


def test_a_run_that_is_cut_short_goes_on_without_the_one_that_it_came_from(
    bordered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("arch=compact", "rate=0", f"pretrained={bordered}")
    report = whole(tmp_path / "whole", *words)
    cut_short(tmp_path / "cut", monkeypatch, *words)
    shutil.rmtree(bordered)
    again = whole(tmp_path / "cut", *words)
    assert again["accuracy"] == report["accuracy"]
    assert same(tmp_path / "cut")
