"""Frozen runs train the compact network: same weights, less time, and only where that is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import compose
from torch import nn

import fpgm
from fpgm.config import Config
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.methods import compacted as compact_training
from fpgm.training import loop as training
from fpgm.training.loop import one_epoch, resume
from fpgm.training.task import Job, load_images, prepare


def job(directory: Path, train_compact: bool, *words: str) -> Job:
    config = Config.of(
        compose("dataset=digits", "batch_size=64", "precision=float32", "device=cpu", *words)
    )
    schedule = replace(config.schedule, train_compact=train_compact)
    config = replace(config, schedule=schedule)
    return prepare(config, directory, load_images(config), fresh=True)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the compact network however little it saves."""
    monkeypatch.setattr(compact_training, "WORTH", 1.0)
    monkeypatch.setattr(compact_training, "MULTIPLE", 1)


def try_compacted(model: nn.Module, rate: float, align: int = 1, residual: str = "inner"):
    groups = prunable(trace(model), residual).groups
    keep = fpgm.select(model, "gm", rate, align=align, groups=groups)
    fpgm.zero_(model, keep)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return compact_training.compacted(model, optimizer, keep, groups, (3, 32, 32))


def in_float64(job: Job) -> None:
    job.model.double()
    job.images = replace(job.images, mean=job.images.mean.double(), std=job.images.std.double())
    normalise = type(job.images).normalise
    object.__setattr__(
        job.images, "normalise", lambda images: normalise(job.images, images).double()
    )


@pytest.mark.parametrize(
    "words",
    [
        ["arch=resnet20", "rate=0.4"],
        ["arch=resnet20", "rate=0.5", "residual=shared", "align=8"],
        ["arch=resnet20", "rate=0.5", "residual=inner", "optimizer.nesterov=false"],
        ["arch=resnet20", "rate=0.4", "optimizer.momentum=0", "optimizer.nesterov=false"],
        ["arch=resnet20", "rate=0.4", "schedule.reset_momentum=false"],
    ],
    ids=lambda words: " ".join(words),
)
def test_compact_and_full_width_training_lead_to_the_same_weights(
    words: list[str], tmp_path: Path, always: None
) -> None:
    jobs = [job(tmp_path, compact, *words, "epochs=2") for compact in (True, False)]
    rows = []
    for one in jobs:
        in_float64(one)
        resume(one, None)
        rows.append([one_epoch(one, epoch) for epoch in range(2)])
    assert jobs[0].compacted is not None
    assert jobs[1].compacted is None
    ours, theirs = (one.model.state_dict() for one in jobs)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-4 * max(1, value.abs().max()), name
    for a, b in zip(jobs[0].model.parameters(), jobs[1].model.parameters(), strict=True):
        moving = [
            one.optimizer.state[p].get("momentum_buffer")
            for one, p in zip(jobs, (a, b), strict=True)
        ]
        assert (moving[0] is None) == (moving[1] is None)
        assert moving[0] is None or (moving[0] - moving[1]).abs().max() <= 1e-4
    for a, b in zip(*rows, strict=True):
        for key in ("accuracy_after", "churn", "revived", "dead", "pruned"):
            assert a[key] == b[key], key


def test_compact_network_is_smaller_and_left_alone_where_it_would_save_nothing() -> None:
    model = fpgm.model("resnet20")
    found = try_compacted(model, 0.5, align=16, residual="shared")
    assert found is not None
    macs = [fpgm.cost(network, (3, 32, 32)).macs for network in (found.network, model)]
    assert macs[0] < 0.6 * macs[1]
    assert try_compacted(fpgm.model("resnet20"), 0.3) is None  # 11 of 16 are 16 again


class NoNorm(nn.Module):
    """Biases of pruned filters are learnt: nothing is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


class Smooth(nn.Module):
    """GELU lets a gradient through at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.norm(self.a(x)))
        return self.fc(self.b(x).mean((2, 3)))


def shifted() -> nn.Module:
    model = fpgm.model("vgg16")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.1)
    return model


@pytest.mark.parametrize("network", [NoNorm, Smooth, shifted])
def test_where_a_pruned_filter_goes_on_learning_the_full_width_is_trained(
    network, always: None
) -> None:
    assert try_compacted(network(), 0.5) is None
    assert try_compacted(fpgm.model("vgg16"), 0.5) is not None


def test_pretrained_networks_are_trained_at_full_width(tmp_path: Path, always: None) -> None:
    model = fpgm.model("resnet20", in_channels=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    one = job(tmp_path, True, "arch=resnet20", f"pretrained={tmp_path}/w.pt")
    resume(one, None)
    assert one.compacted is None


def test_a_selection_that_changes_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: None
) -> None:
    one = job(tmp_path, True, "arch=resnet20", "epochs=2", "rate=0.4")
    resume(one, None)
    first = one.compacted
    training.one_epoch(one, 0)
    assert one.compacted is first  # frozen: built once
    name = "layer1.0.conv1"
    swapped = dict(one.pruning.keep)
    pruned = sorted(set(range(16)) - set(swapped[name].tolist()))
    swapped[name] = torch.tensor(sorted([*swapped[name].tolist()[1:], pruned[0]]))
    monkeypatch.setattr(one.pruning, "selection", lambda rate, align: swapped)
    row = training.one_epoch(one, 1)
    assert row["churn"] > 0
    assert one.compacted is not first
