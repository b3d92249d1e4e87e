"""Frozen runs train the compact network: same weights, less time, and only where that is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import few, made
from torch import nn

import fpgm
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.pruning import compacted as compact_training
from fpgm.selection.rule import Rule
from fpgm.selection.select import highest, score
from fpgm.training.loop import one_epoch
from fpgm.training.task import Task

__all__ = ["few"]  # a fixture


def task_of(directory: Path, train_compact: bool, *words: str) -> Task:
    flag = f"schedule.train_compact={str(train_compact).lower()}"
    return made(directory, flag, *words)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the compact network however little it saves."""
    monkeypatch.setattr(compact_training, "WORTH", 1.0)
    monkeypatch.setattr(compact_training, "MULTIPLE", 1)


def try_compacted(model: nn.Module, rate: float, align: int = 1, residual: str = "inner"):
    groups, rule = prunable(trace(model), residual).groups, Rule("gm", align=align)
    keep = highest(score(model, rule, rate, groups), rule, rate, groups)
    fpgm.zero_(model, keep)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return compact_training.compacted(model, optimizer, keep, groups, (3, 32, 32))


def in_float64(task: Task) -> None:
    task.full.network.double()
    task.images = replace(task.images, mean=task.images.mean.double(), std=task.images.std.double())
    normalise = type(task.images).normalise
    object.__setattr__(
        task.images, "normalise", lambda images: normalise(task.images, images).double()
    )


def trained(directory: Path, arch: str) -> Path:
    """Its shifts and running means are not zero."""
    torch.manual_seed(0)
    model = fpgm.model(arch.partition("=")[2], in_channels=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.1)
    torch.save(model.state_dict(), directory / "w.pt")
    return directory / "w.pt"


def is_compact(task: Task) -> bool:
    return task.trained.network is not task.full.network


@pytest.mark.parametrize(
    "words",
    [
        ["arch=resnet20", "rate=0.4"],
        ["arch=resnet20", "rate=0.5", "residual=shared", "align=8"],
        ["arch=resnet20", "rate=0.5", "residual=inner", "optimizer.nesterov=false"],
        ["arch=resnet20", "rate=0.4", "optimizer.momentum=0", "optimizer.nesterov=false"],
        ["arch=resnet20", "rate=0.4", "schedule.reset_momentum=false"],
        ["arch=resnet20", "rate=0.4", "optimizer.schedule=onecycle", "optimizer.lr=0.02"],
        # Some shifts are above zero: these filters stay, the others go.
        ["arch=resnet20", "rate=0.5", "schedule=hard", "TRAINED"],
        ["arch=resnet20", "rate=0.5", "schedule=soft", "schedule.settle=0.5", "TRAINED"],
        # Shifts of streams are silenced.
        ["arch=resnet20", "rate=0.5", "schedule=gated", "schedule.settle=0.5", "TRAINED"],
        ["arch=resnet20", "rate=0.5", "schedule=fade", "schedule.duration=0.4", "TRAINED"],
        # Once all is gone: the second of two removals is in the first epoch.
        ["arch=resnet20", "rate=0.5", "schedule=iterative", "schedule.every=1", "TRAINED"],
    ],
    ids=lambda words: " ".join(words),
)
def test_compact_and_full_width_training_lead_to_the_same_weights(
    words: list[str], tmp_path: Path, always: None, few: None
) -> None:
    if words[-1] == "TRAINED":
        words = [*words[:-1], f"pretrained={trained(tmp_path, words[0])}"]
    tasks = [task_of(tmp_path, compact, *words) for compact in (True, False)]
    rows = []
    for task in tasks:
        in_float64(task)
        rows.append([one_epoch(task, epoch) for epoch in range(2)])
    assert [is_compact(task) for task in tasks] == [True, False]
    ours, theirs = (task.full.network.state_dict() for task in tasks)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-4 * max(1, value.abs().max()), name
    for a, b in zip(*(task.full.network.parameters() for task in tasks), strict=True):
        moving = [
            task.full.optimizer.state[p].get("momentum_buffer")
            for task, p in zip(tasks, (a, b), strict=True)
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
    macs = [fpgm.cost(network, (3, 32, 32)).macs for network in (found.trained.network, model)]
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


def test_methods_that_act_on_what_is_pruned_keep_the_full_width(
    tmp_path: Path, always: None, few: None
) -> None:
    def trains(*words: str) -> bool:
        task = made(tmp_path, *words)
        for method in task.methods:
            method.before_epoch(0)
        return is_compact(task)

    assert trains()
    assert not trains("method=slimming")
    assert not trains("schedule=soft")
    assert not trains("schedule.zero_at_start=false")
    assert trains("schedule=soft", "schedule.settle=0")


def kept_alive(prepare: Any) -> int:
    """How many of 512 pruned filters of a layer stay in the compact network of a trained VGG."""
    torch.manual_seed(0)
    model, name = fpgm.model("vgg16"), "features.40"
    norm = model.get_submodule("features.41")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    prepare(model, norm, optimizer)
    keep = {name: torch.arange(0, 512, 2)}
    fpgm.zero_(model, keep)
    motion = compact_training.Motion(optimizer, held=False)
    found = compact_training._awake(trace(model), keep, motion)
    return len(found.get(name, keep[name])) - len(keep[name])


def test_what_its_statistics_or_its_momentum_can_wake_is_not_left_out() -> None:
    def momentum(size: float) -> Any:
        def prepare(_: nn.Module, norm: Any, optimizer: torch.optim.SGD) -> None:
            optimizer.state[norm.bias]["momentum_buffer"] = torch.full((512,), -size)

        return prepare

    def mean(size: float) -> Any:
        return lambda _, norm, __: nn.init.constant_(norm.running_mean, size)

    def bias(model: nn.Module, _: nn.Module, __: Any) -> None:
        model.get_submodule("features.40").bias = nn.Parameter(torch.zeros(512))

    assert kept_alive(lambda *_: None) == 0
    # A shift of -.1 and a push of .2 that fades by .9 a step, at a rate of .1: up to .1 and beyond.
    assert kept_alive(momentum(0.2)) == 256
    assert kept_alive(momentum(0.05)) == 0
    assert kept_alive(mean(-0.5)) == 256
    assert kept_alive(mean(0.05)) == 0
    assert kept_alive(bias) == 256


def test_a_selection_that_changes_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: None, few: None
) -> None:
    task = task_of(tmp_path, True, "rate=0.4")
    one_epoch(task, 0)
    first = task.trained
    name = "layer1.0.conv1"
    swapped = dict(task.schedule.keep)
    pruned = sorted(set(range(16)) - set(swapped[name].tolist()))
    swapped[name] = torch.tensor(sorted([*swapped[name].tolist()[1:], pruned[0]]))
    selected: Any = lambda *_: (swapped, {})  # noqa: E731
    monkeypatch.setattr(task.schedule, "_selected", selected)
    row = one_epoch(task, 1)
    assert row["churn"] > 0
    assert task.trained is first  # until the next epoch begins
    for method in task.methods:
        method.before_epoch(2)
    assert is_compact(task)
    assert task.trained is not first
