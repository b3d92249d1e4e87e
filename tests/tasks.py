"""Tasks for tests: a few steps on noise without any file, and whole runs on a handful of digits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import compose
from torch import Tensor, nn
from zoo import randomised

import fpgm
import fpgm.training.task
from fpgm.data.memory import Data
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.machine.ranks import ALONE
from fpgm.methods import Goal, Method, Schedule, Trained
from fpgm.runs.run import Run
from fpgm.selection.rule import Rule
from fpgm.training.asked import asked
from fpgm.training.finish import finish
from fpgm.training.loop import train
from fpgm.training.task import Task, prepare


class Noise:
    """A resnet20 on noise: what a method sees of a task."""

    image = image_shape = (3, 12, 12)
    ranks = ALONE
    device = torch.device("cpu")
    steps = 3
    preprocessing: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, rule: Rule | None = None, rate: float = 0.4, epochs: int = 4,
        model: nn.Module | None = None, from_scratch: bool = True, **goal: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        model = randomised(fpgm.model("resnet20"), 0).train() if model is None else model
        sgd = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        self.full = self.trained = Trained(model, sgd)
        self.goal = Goal(rule or Rule(), rate, **goal)
        self.prunable = prunable(trace(model), self.goal.residual)
        self.epochs, self.from_scratch = epochs, from_scratch
        self.said: list[str] = []
        self.warnings: list[str] = []
        self._batches = [(torch.randn(8, *self.image_shape), torch.randint(10, (8,))) for _ in "ab"]

    def shown(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches[:count])

    def train(self, trained: Trained) -> None:
        self.trained = trained

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def given(self) -> nn.Module:
        return fpgm.model("resnet20")

    def accelerated(self, network: nn.Module) -> nn.Module:
        return network

    def say(self, line: str) -> None:
        self.said.append(line)

    def warn(self, line: str) -> None:
        self.warnings.append(line)


def steps(task: Noise, *methods: Method, count: int = 3) -> list[dict[str, Any]]:
    """A few steps of each epoch, as the loop takes them. Returns what each epoch did."""
    for method in methods:
        method.start()
    rows = []
    for epoch in range(task.epochs):
        for method in methods:
            method.before_epoch(epoch)
        for _ in range(count):
            x, y = torch.randn(8, *task.image_shape), torch.randint(10, (8,))
            task.trained.optimizer.zero_grad()
            F.cross_entropy(task.trained.network(x), y).backward()
            for method in methods:
                method.after_backward()
            task.trained.optimizer.step()
            for method in methods:
                method.after_step()
        row: dict[str, Any] = {}
        for method in methods:
            row |= method.after_epoch(epoch)
        rows.append(row)
    return rows


def count(schedule: Schedule) -> int:
    """How many filters are pruned."""
    network = schedule.task.full.network
    return sum(len(network.get_submodule(n).weight) - len(k) for n, k in schedule.keep.items())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cut down to 96 + 40 images: whole runs in a second or two."""
    load = fpgm.training.task.load

    def cut(device: torch.device, **words: Any) -> Data:
        data = load(device, **words)
        train, test = slice(0, 96), slice(0, 40)
        return Data(
            data.train_images[train], data.train_labels[train], data.test_images[test],
            data.test_labels[test], data.mean, data.std, data.classes, data.pad, data.flip,
        )  # fmt: skip

    monkeypatch.setattr(fpgm.training.task, "load", cut)


WORDS = ("dataset=digits", "batch_size=48", "precision=float32", "device=cpu", "epochs=2")


def made(directory: Path, *words: str) -> Task:
    """A task as it is before the first epoch, or where it was left."""
    return prepare(asked(compose(*WORDS, *words)), directory)


def whole(directory: Path, *words: str) -> dict[str, Any]:
    """A run from where it stands to its report, in this process."""
    config = asked(compose(*WORDS, *words))
    with Run(directory, config.as_dict(), keep_failed=True) as run:
        task = prepare(config, directory)
        train(task, run)
        return finish(task, run)


def cut_short(directory: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """The same, interrupted in its second epoch."""
    one_epoch = fpgm.training.loop.one_epoch

    def interrupted(task: Task, epoch: int) -> dict[str, Any]:
        if epoch == 1:
            raise KeyboardInterrupt
        return one_epoch(task, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(fpgm.training.loop, "one_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole(directory, *words)
