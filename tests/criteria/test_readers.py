"""What is seen of the layers that read a filter's channel: their weights, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fpgm
from fpgm.criteria import CRITERIA, Readers, Worth
from fpgm.criteria.evidence import gather
from fpgm.criteria.views import Collector
from fpgm.errors import Error
from fpgm.graph.trace import trace

IMAGE = (3, 32, 32)


class Reading(nn.Module):
    """A channel read twice through a cat, by groups, behind a flatten, and through a depthwise
    convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(8, 6, 3, padding=1)
        self.groups = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(4, 4, 3, groups=4)
        self.point = nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.groups(F.relu(self.twice(torch.cat((x, x), 1)))))
        x = F.adaptive_avg_pool2d(F.relu(self.point(self.deep(x))), 2)
        return self.fc(x.flatten(1))


def seen(model: nn.Module, view: Readers | Worth, image=None) -> dict[str, Tensor]:
    graph = trace(model)
    collector: Collector = view.collector(graph, [name for _, name in graph.writers()], image)
    return dict(collector.values())


def squares(weights: Tensor) -> Tensor:
    return weights.square().sum(1)


def test_weights_that_read_a_channel_are_those_that_its_gradient_goes_through() -> None:
    """By slices of the weights, written down layer by layer."""
    torch.manual_seed(0)
    model = Reading().double()
    found = seen(model, Readers(squares))
    twice, groups, point, fc = (
        getattr(model, n).weight.detach().square() for n in ("twice", "groups", "point", "fc")
    )
    expected = {
        "a": twice[:, :4].sum((0, 2, 3)) + twice[:, 4:].sum((0, 2, 3)),
        "twice": torch.cat((groups[:2].sum((0, 2, 3)), groups[2:].sum((0, 2, 3)))),
        "groups": point.sum((0, 2, 3)),
        "deep": point.sum((0, 2, 3)),
        "point": fc.view(7, 5, 4).sum((0, 2)),
    }
    assert found.keys() == expected.keys()
    for layer, values in expected.items():
        torch.testing.assert_close(found[layer], values, rtol=1e-12, atol=0)


def test_a_stream_is_read_for_all_that_write_into_it() -> None:
    model = fpgm.model("resnet20")
    found = seen(model, Readers(squares))
    stream = [model.layer1[block].conv1.weight for block in range(3)]
    stream += [model.layer2[0].conv1.weight]
    read = sum(weight.detach().double().square().sum((0, 2, 3)) for weight in stream[1:])
    assert (found["layer1.0.conv2"] >= read - 1e-9).all()  # and by whoever reads it further on
    first = stream[0].detach().double().square().sum((0, 2, 3))
    torch.testing.assert_close(found["conv1"] - found["layer1.0.conv2"], first)


def still(model: nn.Module) -> nn.Module:
    """Nothing but zeros comes from a filter of zeros, so that nothing has to be folded in."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


# Networks, and layers of theirs whose filters are tied to no others.
ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lenet5": (lambda: fpgm.model("lenet5"), ""),
    "vgg11": (lambda: fpgm.model("vgg11"), ""),
    "resnet20": (lambda: fpgm.model("resnet20"), "conv1"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_a_filter_costs_is_what_is_saved_when_it_alone_goes(name: str) -> None:
    make, only = ALONE[name]
    model = still(make())
    image = (1, 28, 28) if name == "lenet5" else IMAGE
    if name == "lenet5":
        model = still(fpgm.model("lenet5", in_channels=1))
    found = {of: seen(model, Worth(of), image) for of in ("macs", "params")}
    dense = fpgm.cost(model, image)
    keep = fpgm.select(model, "l1", 0.0)
    layers = [layer for layer in keep if only in layer and (not only or layer != only)]
    assert len(layers) >= 2
    for layer in layers:
        fewer = {**keep, layer: keep[layer][1:]}
        zeroed = still(make() if name != "lenet5" else fpgm.model("lenet5", in_channels=1))
        zeroed.load_state_dict(model.state_dict())
        fpgm.zero_(zeroed, fewer)
        small = fpgm.cost(fpgm.compact(zeroed, fewer), image)
        assert dense.macs - small.macs == pytest.approx(float(found["macs"][layer][0]) * dense.macs)
        saved = dense.params - small.params
        assert saved == pytest.approx(float(found["params"][layer][0]) * dense.params), layer


@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(deadline=None, max_examples=10)
def test_cpmc_is_weights_over_costs_by_the_formula(seed: int, balance: float) -> None:
    """Of a layer in the middle of a VGG, written down: C K^2 + N_next K_next^2 and so on."""
    torch.manual_seed(seed)
    model = fpgm.model("vgg11")
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    one, two = convs[2], convs[3]  # on maps of 8 x 8
    dense = fpgm.cost(model, IMAGE)
    weights = one.weight.abs().sum((1, 2, 3)) + two.weight.abs().sum((0, 2, 3))
    entries = one.in_channels * 9 + two.out_channels * 9
    biases = 2 + (one.bias is not None)  # and the BatchNorm's scale and shift
    costs = balance * 64 * entries / dense.macs + (1 - balance) * (entries + biases) / dense.params
    evidence = gather(model, ["cpmc"], layers=[names[2]], image=IMAGE)[names[2]]
    scores = CRITERIA["cpmc"](one.weight, **evidence, balance=balance)
    torch.testing.assert_close(scores, weights.detach().double() / costs, rtol=1e-5, atol=0)


def test_one_ranking_by_weights_over_costs_takes_dear_layers_first() -> None:
    """Of two layers with the same sums of weights the one with the larger maps loses more."""
    model = fpgm.model("vgg11")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.05)
    options = {"scope": "global", "normalise": "none", "image": IMAGE}
    macs = fpgm.select(model, "cpmc", 0.3, balance=1.0, **options)
    params = fpgm.select(model, "cpmc", 0.3, balance=0.0, **options)
    filters = {name: len(model.get_submodule(name).weight) for name in macs}
    first, last = list(macs)[1], list(macs)[-1]
    gone = {
        (which, name): 1 - len(keep[name]) / filters[name]
        for which, keep in (("macs", macs), ("params", params))
        for name in (first, last)
    }
    assert gone["macs", first] > gone["params", first]
    assert gone["macs", last] < gone["params", last]


def test_without_the_images_size_it_is_asked_for_in_one_line() -> None:
    with pytest.raises(Error, match=r"^image=None: .*give image=\(C, H, W\)$"):
        fpgm.select(fpgm.model("vgg11"), "cpmc")


def test_balance_out_of_range_is_named() -> None:
    with pytest.raises(Error, match=r"^criterion.balance=1.5: must be at least 0 and at most 1"):
        fpgm.select(fpgm.model("vgg11"), "cpmc", image=IMAGE, balance=1.5)
