"""Accuracies that are those of the changed network, whatever was measured before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from zoo import randomised

import fpgm
from fpgm.sensitivity import probe
from fpgm.sensitivity.probe import Probe

Batches = list[tuple[Tensor, Tensor]]


class Twice(nn.Module):
    """One BatchNorm that stands before a layer and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.fc(torch.relu(self.norm(self.second(x))).mean((2, 3)))


class Overwriting(nn.Module):
    """What the second layer reads is overwritten behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.norm1, self.norm2, self.fc = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        x += self.norm2(self.second(x))
        return self.fc(torch.relu(x).mean((2, 3)))


@torch.no_grad()
def network(name: str) -> nn.Module:
    own = {"twice": Twice, "overwriting": Overwriting}
    torch.manual_seed(0)
    model = randomised(own[name]() if name in own else fpgm.model(name), 0).eval()
    if name == "twice":  # so that it matters which calls the statistics are of
        model.second.weight *= 20
    # So that no class is the answer to all images.
    model.fc.bias -= torch.cat([model(images) for images, _ in batches(2, 3)]).mean(0)
    return model


@torch.no_grad()
def shown_to(model: nn.Module, training: Batches) -> Batches:
    """Half of the labels are what the network says, half what it says with BatchNorm estimated
    again: both accuracies tell something."""
    again = estimated(model, training)
    return [
        (x, torch.where(torch.arange(len(y)) % 2 == 0, model(x).argmax(1), again(x).argmax(1)))
        for x, y in batches(6, 1)
    ]


def estimated(model: nn.Module, training: Batches) -> nn.Module:
    again = copy.deepcopy(model)
    update_bn((images for images, _ in training), again)
    return again.eval()


def batches(count: int, seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    # Of more images than one, and the last of fewer than the others.
    images = torch.randn(12 * count - 5, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (len(images),), generator=generator)
    return list(zip(images.split(12), labels.split(12), strict=True))


def plainly(
    model: nn.Module, keep: dict[str, Tensor], shown: Batches, training: Batches
) -> tuple[float, float]:
    """The same by a network that is changed, and run from its start."""

    @torch.no_grad()
    def accuracy() -> float:
        right = [(changed(x).argmax(1) == y).sum().item() for x, y in shown]
        return 100 * sum(right) / sum(len(y) for _, y in shown)

    changed = copy.deepcopy(model).eval()
    fpgm.zero_(changed, keep)
    as_it_is = accuracy()
    changed = estimated(changed, training)
    return as_it_is, accuracy()


CHANGES = {
    # Shortcuts A, and ReLUs that overwrite what they read.
    "resnet20": ("conv1", "layer1.1.conv2", "layer2.0.conv1", "layer3.2.conv2"),
    "resnet18": ("conv1", "layer1.0.conv1", "layer3.0.conv2", "layer4.1.conv2"),
    "twice": ("first", "second"),
    "overwriting": ("first", "second"),
}


@pytest.mark.parametrize("held", [0, probe.HELD])
@pytest.mark.parametrize("name", CHANGES)
def test_accuracies_are_those_of_the_changed_network_in_any_order(
    name: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "HELD", held)
    model, training = network(name), batches(3, 2)
    shown = shown_to(model, training)
    before = copy.deepcopy(model.state_dict())
    measure = Probe(model, shown, training, None)
    changes: list[dict[str, Tensor]] = [
        {},
        *({layer: torch.arange(2, 6)} for layer in CHANGES[name]),
        {CHANGES[name][-1]: torch.arange(1, 4)},  # from the same place once more
        {layer: torch.arange(1, 6) for layer in CHANGES[name][:2]},
    ]
    forwards = [measure.accuracies(keep) for keep in changes]
    backwards = [measure.accuracies(keep) for keep in reversed(changes)]
    assert forwards == backwards[::-1]
    assert forwards == [plainly(model, keep, shown, training) for keep in changes]
    # The statistics themselves, to which a few images' answers may be blind.
    for keep in changes:
        measure.accuracies(keep)
        ours = measure._again.module.state_dict()
        changed = copy.deepcopy(model)
        fpgm.zero_(changed, keep)
        for key, value in estimated(changed, training).state_dict().items():
            if "running" in key:
                torch.testing.assert_close(ours[key], value)
    assert len(set(forwards)) > 2
    assert any(a != b for a, b in forwards)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_what_stands_before_a_layer_is_run_once() -> None:
    calls: list[nn.Module] = []
    model = network("resnet20")
    measure = Probe(model, batches(1, 1), batches(1, 2), None)
    for images in (measure._plain, measure._again):  # the third shares its network
        images.module.conv1.register_forward_hook(lambda *_: calls.append(model))
    for kept in (2, 5, 7, 9):
        measure.accuracies({"layer3.2.conv2": torch.arange(kept)})
    assert len(calls) <= 6  # of each of three passes, once to see what it takes and once


def test_network_without_batchnorm_has_one_accuracy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 10)).eval()  # fmt: skip
    measure = Probe(model, batches(2, 1), batches(1, 2), None)
    assert not measure.estimates
    one, other = measure.accuracies({"0": torch.arange(3)})
    assert one == other


def test_filters_are_back_even_where_a_measurement_is_broken_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, keep = network("resnet20"), {"layer2.0.conv1": torch.arange(3)}
    measure = Probe(model, shown_to(model, batches(1, 2)), batches(1, 2), None)
    dense = measure.accuracies({})
    with monkeypatch.context() as patch:
        patch.setattr(probe.fx.Interpreter, "run_node", None)
        with pytest.raises(TypeError):
            measure.accuracies(keep)
    assert measure.accuracies({}) == dense
    assert measure.accuracies(keep) != dense
