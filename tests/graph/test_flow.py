"""Who writes and who reads each channel, what stands behind it, and what is kept whole."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import FAMILIES, Mysterious, Overwrites

import fpgm
from fpgm.errors import GraphError
from fpgm.graph import operations as ops
from fpgm.graph.flow import Algebra, batch_norms, follow, kept_full, projections, rectifiers
from fpgm.graph.trace import trace


class Body(nn.Module):
    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body = body
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.d = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.relu, self.drop = nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self, x).mean((2, 3)))


class Texts(Algebra[str]):
    """The walk written down."""

    def written(self, node, read):
        return f"{node.target}({read or ''})"

    def joined(self, node, parts):
        return "[" + "|".join(parts) + "]"

    def padded(self, node, source, front, back):
        return f"{front}<{source}>{back}"

    def chosen(self, node, source, channels):
        return f"{source}{list(channels)}"

    def met(self, node, a, b):
        return None if "deep" in a else f"{a}.{b}"

    def mapped(self, node, source):
        return source if "a" in source else "deep" + source


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (lambda s, x: s.relu(s.norm(s.a(x))), "a()"),
        (lambda s, x: s.d(s.relu(s.a(x))), "d(a())"),
        (lambda s, x: s.b(s.a(x)), "b()"),
        (lambda s, x: s.a(x) + s.c(x), "a().c()"),
        (lambda s, x: s.c(x) * s.a(x), "c().a()"),
        (lambda s, x: torch.cat((s.c(x), s.a(x), s.c(x)[:, :]), 1), None),
        (lambda s, x: torch.cat([s.c(x), s.a(x)], dim=1), "[c()|a()]"),
        (lambda s, x: F.pad(s.a(x), (0, 0, 0, 0, 1, 2)), "1<a()>2"),
        (lambda s, x: F.avg_pool2d(s.a(x), x.size(3)), "a()"),
        (lambda s, x: s.a(x) + x, None),
        (lambda s, x: s.a(x).softmax(1), None),
        (lambda s, x: s.relu(s.c(x)) + s.a(x), None),
    ],
)
def test_channels_are_followed_through_every_kind_of_operation(body, text: str | None) -> None:
    graph = trace(Body(body))
    last = next(node for node in graph.kinds if node.target == "mean")
    flow = follow(graph, Texts())
    assert next(iter(flow.read[last].values())) == text
    assert flow.written[next(n for n, k in graph.kinds.items() if k == ops.LINEAR)] is None


def test_whoever_reads_an_overwritten_value_is_given_the_result() -> None:
    def body(s: Body, x: Tensor) -> Tensor:
        a, c = s.a(x), s.c(x)
        b = s.b(a)
        a += c
        return s.d(a) * b + s.d.bias.sum() * torch.relu(a)

    def again(s: Body, x: Tensor) -> Tensor:
        a = s.a(x)
        torch.relu_(a).add_(s.c(x))
        return a

    graph = trace(Body(again))
    last = next(node for node in graph.kinds if node.target == "mean")
    flow = follow(graph, Texts())
    assert flow.read[last] == {next(n for n in graph.kinds if n.target == "a"): "a().c()"}
    assert flow.written[next(n for n in graph.kinds if n.target == "a")] == "a()"
    assert len(list(trace(Body(body)).convolutions())) == 4


@pytest.mark.parametrize(
    ("body", "behind", "rectified"),
    [
        (lambda s, x: s.relu(s.norm(s.a(x))), "norm", "relu"),
        (lambda s, x: F.relu(s.norm(F.max_pool2d(s.a(x), 2))), "norm", "relu"),
        (lambda s, x: s.norm(F.gelu(s.a(x))), "norm", None),
        (lambda s, x: s.norm(y := s.a(x)) + y, None, None),
        (lambda s, x: s.relu(s.drop(s.norm(s.a(x))) + x), "norm", "relu"),
        (lambda s, x: s.norm(s.a(x))[:, :, ::2].relu(), "norm", "relu_1"),
        (lambda s, x: s.relu(torch.cat((s.a(x), x), 1)).chunk(2, 1)[0], None, None),
        (lambda s, x: F.avg_pool2d(s.norm(y := s.a(x)), y.size(2)), "norm", None),
        (lambda s, x: s.b(s.a(x)).relu(), None, None),
    ],
)
def test_what_stands_behind_a_convolution(body, behind: str | None, rectified: str | None) -> None:
    graph = trace(Body(body))
    assert batch_norms(graph).get("a") == behind
    relu = rectifiers(graph).get("a")
    assert (relu is None) == (rectified is None)
    assert relu is None or relu.name.startswith("relu")


def test_a_norm_without_scale_says_nothing() -> None:
    model = Body(lambda s, x: s.norm(s.a(x)))
    model.norm = nn.BatchNorm2d(4, affine=False)
    assert batch_norms(trace(model)) == {}


def test_a_rectifier_behind_a_flatten_makes_no_feature_maps() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.a(x).mean((2, 3))))

    assert rectifiers(trace(Flat())) == {}


@pytest.mark.parametrize(("name", "count"), [("resnet", 3), ("bottleneck", 4), ("densenet", 0)])
def test_projections_are_the_shortcuts_of_one_convolution(name: str, count: int) -> None:
    every = list(projections(trace(FAMILIES[name]())))
    assert len(every) == count
    assert all("downsample" in name for name in every)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (lambda s, x: s.norm(s.a(x)) + s.c(s.b(x)), ["a"]),
        (lambda s, x: s.c(s.b(x)) + s.a(x), ["a"]),
        (lambda s, x: s.a(x) + s.b(x), []),  # as deep as the other
        (lambda s, x: (y := s.a(x)) + s.c(s.b(y)), []),  # both come through it
        (lambda s, x: s.relu(s.a(x)) + s.c(s.b(x)), []),
        (lambda s, x: s.a(x) + s.c(s.b(s.relu(x))), ["a"]),
    ],
)
def test_a_projection_stands_beside_two_or_more(body, names: list[str]) -> None:
    assert list(projections(trace(Body(body)))) == names


def test_why_each_is_kept_whole() -> None:
    kept = kept_full(trace(Mysterious()))
    assert kept == {
        "shuffled": "its channels go into softmax, which pruning does not understand",
        "twice": "its weight is used twice",
        "head": "its filters are outputs of the network",
    }
    assert kept_full(trace(Overwrites())) == {}
    assert kept_full(trace(fpgm.model("resnet20"))) == {}


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (lambda s, x: s.d(s.a(x)).softmax(1), {"a", "d"}),
        (lambda s, x: torch.cat((x, s.a(x)), 1).softmax(1)[:, :4], {"a"}),
        (lambda s, x: s.b(s.a(x)).softmax(1), {"b"}),
        (lambda s, x: (s.a(x) + F.pad(s.b(x), (0, 0, 0, 0, 0, 0))).softmax(1), {"a", "b"}),
        (lambda s, x: (s.a(x) * s.b(x).sigmoid()).softmax(1), {"a", "b"}),
        (lambda s, x: s.a(x) * s.a(x).shape[2], {"a"}),  # called twice
        (lambda s, x: (y := s.a(x)) * y.shape[2], set()),
        (lambda s, x: (y := s.a(x)) * y.shape[1], set()),  # a number, whatever the image
    ],
)
def test_what_comes_to_an_unknown_operation_is_kept(body, kept: set[str]) -> None:
    assert set(kept_full(trace(Body(body)))) == kept


def test_layers_that_share_a_weight_or_are_no_plain_ones_are_kept() -> None:
    class Own(nn.Conv2d):
        pass

    model = Body(lambda s, x: s.c(s.b(s.a(x))))
    model.b.weight = model.a.weight
    model.c = Own(4, 4, 1)
    model.c.forward = model.c.forward
    kept = kept_full(trace(model))
    assert kept["a"] == kept["b"] == "its weight is used twice"
    hooked = Body(lambda s, x: s.a(x))
    hooked.a.register_forward_pre_hook(lambda *_: None)
    assert kept_full(trace(hooked)) == {"a": "it has a hook"}


def view_overwritten(s: Body, x: Tensor) -> Tensor:
    y = s.a(x)
    y[:, :, ::2].relu_()
    return s.b(y)


def base_overwritten(s: Body, x: Tensor) -> Tensor:
    y = s.a(x)
    part = y[:, :, ::2]
    torch.relu_(y)
    return s.b(part)


@pytest.mark.parametrize("body", [view_overwritten, base_overwritten])
def test_overwriting_a_view_that_is_read_again_is_refused(body) -> None:
    with pytest.raises(GraphError, match="write to a copy"):
        trace(Body(body))


def test_a_network_with_control_flow_says_where() -> None:
    line = r"Body cannot be traced by torch.fx at .*test_flow.py:\d+ \(.*x.sum\(\) > 0"
    with pytest.raises(GraphError, match=line):
        trace(Body(lambda s, x: x if x.sum() > 0 else -x))


def test_tracing_leaves_the_mode_as_it_was() -> None:
    model = Body(lambda s, x: s.norm(s.a(x)))
    model.norm.eval()
    trace(model)
    assert model.training
    assert model.a.training
    assert not model.norm.training


def test_which_values_are_flat() -> None:
    graph = trace(Body(lambda s, x: s.relu(s.a(x))))
    assert {node.name for node in graph.flat} == {"mean", "fc"}
    kept = trace(Body(lambda s, x: s.a(x).mean((2, 3), keepdim=True)))
    assert {node.name for node in kept.flat} == {"mean_1", "fc"}


@pytest.mark.parametrize(
    ("body", "target"),
    [
        (lambda s, x: torch.cat((s.a(x).mean((2, 3)), s.b(x).mean((2, 3))), 1)[:, :4], torch.cat),
        (lambda s, x: s.a(x).mean((2, 3))[:, :], operator.getitem),
        (lambda s, x: s.a(x) + s.b(x).mean((2, 3)), operator.add),
        (lambda s, x: s.fc(s.a(x)), "fc"),  # along the width
        (lambda s, x: s.norm(s.norm(s.a(x))), "norm"),  # called twice
    ],
)
def test_rules_for_images_are_not_applied_to_features(body, target: object) -> None:
    graph = trace(Features(body))
    assert next(k for n, k in graph.kinds.items() if n.target == target) == ops.OPAQUE


class Features(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)
