"""What the analysis says of each tensor, before any network is built."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import FAMILIES, Gated, Odd, Overwrites, randomised, zeroed

import fpgm
from fpgm.compaction.compact import compact
from fpgm.compaction.constants import Channels, analyse
from fpgm.graph.cost import cost
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.networks.layers import BorderConv2d, Expand, Pick


def kept(*indices: int) -> Tensor:
    return torch.tensor(indices)


def node_named(graph: ChannelGraph, name: str):
    return next(node for node in graph.kinds if node.name == name)


class Steps(nn.Module):
    """a -> norm -> relu -> pad -> b, and c beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c = nn.Conv2d(3, 7, 3, padding=1)
        self.b = nn.Conv2d(7, 2, 3, padding=1)
        self.fc = nn.Linear(2 * 4, 3)
        with torch.no_grad():
            self.a.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            self.c.bias.copy_(torch.arange(10.0, 17.0))
            self.norm.running_mean.copy_(torch.tensor([1.0, 1.0, 5.0, 1.0]))
            self.norm.running_var.fill_(4 - self.norm.eps)
            self.norm.bias.fill_(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        self.padded = F.pad(x, (0, 0, 0, 0, 1, 2), value=7.0)
        y = self.padded + self.c(x[:, :3])
        return self.fc(F.adaptive_avg_pool2d(self.b(y), 2).flatten(1))


def channels(graph: ChannelGraph, name: str, **keep: Tensor) -> tuple[list[int], list[float]]:
    found = analyse(graph, keep).flow.written[node_named(graph, name)]
    assert found is not None
    assert found.total == len(found.constant)
    return found.live.tolist(), found.constant.tolist()


def approx(*values: float):
    return pytest.approx(list(values), nan_ok=True)


NAN = math.nan


def test_constants_go_through_every_step() -> None:
    model = Steps().eval()
    model.forward = lambda x: Steps.forward(model, x)  # type: ignore[method-assign]
    graph = trace(model)
    keep = {"a": kept(3, 0)}
    assert channels(graph, "a", **keep) == ([0, 3], approx(NAN, 2, 3, NAN))
    assert channels(graph, "norm", **keep) == ([0, 3], approx(NAN, 0.75, -0.75, NAN))
    assert channels(graph, "relu", **keep) == ([0, 3], approx(NAN, 0.75, 0, NAN))
    assert channels(graph, "pad", **keep) == ([1, 4], approx(7, NAN, 0.75, 0, NAN, 7, 7))
    assert channels(graph, "b", b=kept(1))[0] == [1]
    assert channels(graph, "flatten", b=kept(1))[0] == [1]
    found = analyse(graph, {"b": kept(1)}).inputs(node_named(graph, "fc"))
    assert (found.total, found.live.tolist()) == (8, [4, 5, 6, 7])


def test_a_sum_has_what_either_side_has() -> None:
    model = Gated().eval()
    graph = trace(model)
    model.gate.bias.data = torch.arange(6.0)
    with torch.no_grad():
        model.a.bias.copy_(torch.ones(6))
    found = analyse(graph, {"a": kept(0, 1), "gate": kept(1, 2)})
    product = found.flow.written[node_named(graph, "mul")]
    assert product is not None
    assert product.live.tolist() == [0, 1, 2]
    silu = F.silu(torch.ones(1, dtype=torch.float64) / math.sqrt(1 + 1e-5))
    gates = torch.sigmoid(torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64))
    assert torch.allclose(product.constant[3:], silu * gates)
    assert product.constant[:3].isnan().all()
    # Each side lacks what the other has, and nothing is picked out.
    assert [(e.source.name, e.missing.tolist()) for e in found.widened()] == [
        ("silu", [2]),
        ("sigmoid", [0]),
    ]
    assert all(e.picked.all() for e in found.expansions.values())


def test_runs_of_features_belong_to_their_channel() -> None:
    features = Channels(3, kept(0, 2), torch.tensor([NAN, 5.0, NAN])).features(9)
    assert features.live.tolist() == [0, 1, 2, 6, 7, 8]
    assert features.absent.tolist() == [0, 0, 0, 5, 5, 5, 0, 0, 0]


def test_what_stays_as_ballast_is_emitted_and_constant() -> None:
    graph = trace(Steps().eval())
    found = analyse(graph, {"a": kept(0, 3)}, {"a": kept(0, 2)})
    assert found.kept["a"].tolist() == [0, 3]
    assert found.emitted["a"].tolist() == [0, 2, 3]
    assert found.emitted["c"].tolist() == list(range(7))
    written = found.flow.written[node_named(graph, "a")]
    assert written is not None
    assert written.live.tolist() == [0, 2, 3]
    assert written.constant.tolist() == approx(NAN, 2, 3, NAN)
    assert written.absent.tolist() == [0, 2, 0, 0]


@pytest.mark.parametrize(
    ("biases", "live", "carrier"),
    [
        ([1.0, 5.0, -9.0, 2.0], (0, 2), 1),  # the largest in size that is there: filter 2
        ([1.0, 5.0, 0.01, 2.0], (0, 2), None),  # too small beside 5 to carry it
        ([1.0, 5.0, 0.06, 2.0], (0, 2), 1),
        ([1.0, 5.0, 3.0, 2.0], (0,), None),  # none is there
    ],
)
def test_the_largest_constant_that_is_there_carries_the_others(
    biases: list[float], live: tuple[int, ...], carrier: int | None
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1)).double()
    model[0].bias.data = torch.tensor(biases).double()
    keep = {"0": kept(0)}
    found = analyse(trace(model), keep, {"0": kept(*live)})
    assert found.carriers == {"1": carrier}
    fpgm.zero_(model, keep)
    small = compact(model, keep, {"0": kept(*live)})
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert (small(x) - model(x)).abs().max() < 1e-12
    assert (small.get_submodule("1").border is None) == (carrier is not None)


@pytest.mark.parametrize(
    ("options", "bordered"),
    [
        ({"padding": 1}, True),
        ({"padding": (0, 1)}, True),
        ({"padding": "same"}, True),
        ({"padding": "valid"}, False),
        ({"padding": 0}, False),
        ({"padding": 1, "padding_mode": "reflect"}, False),
    ],
)
def test_only_zeros_around_the_image_make_a_map(options: dict, bordered: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, bias=False, **options)).double()
    keep = {"0": kept(0, 1)}
    assert bool(analyse(trace(model), keep).carriers) == bordered
    assert analyse(trace(model), {}).carriers == {}
    fpgm.zero_(model, keep)
    small = compact(model, keep)
    assert isinstance(small.get_submodule("1"), BorderConv2d) == bordered
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert (small(x) - model(x)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "network",
    [Odd, Overwrites, lambda: fpgm.model("resnet20"), *(FAMILIES[n] for n in ("mobilenet_v2",))],
)
def test_the_network_that_is_built_is_the_one_foretold(network) -> None:
    model, keep = zeroed(0, 0.5, network(), torch.float64)
    analysis, small = analyse(trace(model), keep), compact(model, keep)
    parts = dict(small.named_modules())
    assert sum(isinstance(m, Expand) for m in parts.values()) == len(list(analysis.widened()))
    picks = [e for e in analysis.expansions.values() if not e.picked.all()]
    assert sum(isinstance(m, Pick) for m in parts.values()) == len(picks)
    maps = {n for n, m in parts.items() if isinstance(m, BorderConv2d)}
    assert maps == set(analysis.carriers)
    image = (3, 47, 52)
    assert analysis.macs(cost(model, image)) == cost(small, image).macs


def test_the_analysis_leaves_the_network_as_it_was() -> None:
    model = randomised(Odd(), 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyse(trace(model), {"a": kept(1, 2)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.norm.weight.dtype == torch.float32
