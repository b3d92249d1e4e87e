"""What each operation, in the spellings that people use, does to channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.errors import GraphError
from fpgm.graph import operations as ops
from fpgm.graph.trace import trace


class Layers(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.conv, self.norm, self.fc = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


def last(body: Callable[..., Any]) -> tuple[fx.Node, dict[str, nn.Module]]:
    """The operation whose result is given back."""
    model = Layers(body)
    graph = fx.Tracer().trace(model)
    return next(iter(graph.nodes.__reversed__())).args[0], dict(model.named_modules())


def kind(body: Callable[..., Any]) -> str:
    return ops.kind_of(*last(body))


FUNCTIONS = {
    ops.CONV: [lambda s, x, y: s.conv(x)],
    ops.NORM: [lambda s, x, y: s.norm(x)],
    ops.LINEAR: [lambda s, x, y: s.fc(x)],
    ops.ADD: [
        lambda s, x, y: x + y,
        lambda s, x, y: torch.add(x, y),
        lambda s, x, y: x.add_(y),
        lambda s, x, y: operator.iadd(x, y),
    ],
    ops.MUL: [lambda s, x, y: x * y, lambda s, x, y: operator.imul(x, y)],
    ops.CAT: [
        lambda s, x, y: torch.cat((x, y), 1),
        lambda s, x, y: torch.cat([x, y], dim=1),
        lambda s, x, y: torch.concat([x, y], 1),
    ],
    ops.ELEMENTWISE: [
        lambda s, x, y: F.relu(x),
        lambda s, x, y: x.sigmoid_(),
        lambda s, x, y: F.dropout(x, 0.5, s.training),
        lambda s, x, y: x / 3,
        lambda s, x, y: x - 3.0,
        lambda s, x, y: x * 2,
        lambda s, x, y: torch.add(x, 2),
    ],
    ops.POOL: [
        lambda s, x, y: F.avg_pool2d(x, 2),
        lambda s, x, y: F.max_pool2d(x, 3, padding=1),
        lambda s, x, y: F.avg_pool2d(x, 3, 1, 1, False, False),
        lambda s, x, y: F.avg_pool2d(x, 3, padding=1, count_include_pad=False),
        lambda s, x, y: F.adaptive_avg_pool2d(x, 1),
        lambda s, x, y: x.mean((2, 3)),
        lambda s, x, y: x.mean(dim=[-1, -2], keepdim=True),
        lambda s, x, y: torch.mean(x, (3, 2)),
    ],
    ops.SPATIAL: [
        lambda s, x, y: F.avg_pool2d(x, 3, 1, 1),  # zeros are averaged in
        lambda s, x, y: F.avg_pool2d(x, 3, padding=1),
        lambda s, x, y: F.avg_pool2d(x, 2, divisor_override=3),
        lambda s, x, y: F.pad(x, (1, 1)),
        lambda s, x, y: F.pad(x, (1, 1, 0, 2), "reflect"),
    ],
    ops.FLATTEN: [
        lambda s, x, y: torch.flatten(x, 1),
        lambda s, x, y: x.flatten(start_dim=1),
        lambda s, x, y: x.view(x.size(0), -1),
        lambda s, x, y: x.reshape(x.shape[0], -1),
        lambda s, x, y: x.view(x.size()[0], -1),
    ],
    ops.SLICE: [lambda s, x, y: x[:, :, ::2, 1:], lambda s, x, y: x[:, :]],
    ops.PAD: [
        lambda s, x, y: F.pad(x, (0, 0, 0, 0, 1, 2)),
        lambda s, x, y: F.pad(x, [0, 0, 0, 0, 0, 2], "constant", 1.5),
    ],
    ops.OPAQUE: [
        lambda s, x, y: s.norm(input=x),
        lambda s, x, y: torch.add(x, y, alpha=2),
        lambda s, x, y: 2 / x,
        lambda s, x, y: x - y,
        lambda s, x, y: x / y,
        lambda s, x, y: torch.cat((x, y)),
        lambda s, x, y: torch.cat((x, y), 2),
        lambda s, x, y: torch.cat(tensors=(x, y), dim=1),
        lambda s, x, y: F.leaky_relu(x, y),
        lambda s, x, y: F.max_pool2d(x, 2, return_indices=True),
        lambda s, x, y: x.mean((1, 2)),
        lambda s, x, y: x.mean(),
        lambda s, x, y: torch.flatten(x),
        lambda s, x, y: torch.flatten(x, 2),
        lambda s, x, y: x.flatten(1, 2),
        lambda s, x, y: x.view(x.size(1), -1),
        lambda s, x, y: x.view(x.shape[1], -1),
        lambda s, x, y: x.view(2, -1),
        lambda s, x, y: x[:, 1:],
        lambda s, x, y: x[1:],
        lambda s, x, y: x[:, :, 0],
        lambda s, x, y: F.pad(x, (1, 1, 0, 0, 1, 2)),
        lambda s, x, y: F.pad(x, (0, 0, 0, 0, -1, 2)),
        lambda s, x, y: F.pad(x, (0, 0, 0, 0, 1, 1), "replicate"),
        lambda s, x, y: x.softmax(1),
    ],
}


@pytest.mark.parametrize(
    ("wanted", "body"), [(kind, body) for kind, bodies in FUNCTIONS.items() for body in bodies]
)
def test_each_spelling_is_what_it_does(wanted: str, body: Callable[..., Any]) -> None:
    assert kind(body) == wanted


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (nn.Conv2d(4, 8, 3), ops.CONV),
        (nn.Conv2d(4, 4, 3, groups=4), ops.DEPTHWISE),
        (nn.Conv2d(4, 8, 3, groups=4), ops.GROUPED),
        (nn.Conv2d(4, 4, 3, groups=2), ops.GROUPED),
        (nn.ConvTranspose2d(4, 4, 3), ops.OPAQUE),
        (nn.BatchNorm2d(4, track_running_stats=False), ops.OPAQUE),
        (nn.BatchNorm1d(4), ops.NORM),
        (nn.GroupNorm(2, 4), ops.OPAQUE),
        (nn.PReLU(), ops.ELEMENTWISE),
        (nn.PReLU(4), ops.SLOPE),
        (nn.Softmax(1), ops.OPAQUE),
        (nn.AvgPool2d(3, padding=1), ops.SPATIAL),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), ops.POOL),
        (nn.MaxPool2d(3, padding=1), ops.POOL),
        (nn.Flatten(), ops.FLATTEN),
        (nn.Flatten(2), ops.OPAQUE),
    ],
)
def test_each_layer_is_what_it_does(module: nn.Module, wanted: str) -> None:
    node = fx.Tracer().trace(nn.Sequential(module)).find_nodes(op="call_module", target="0")[0]
    assert ops.kind_of(node, {"0": module}) == wanted


@pytest.mark.parametrize(
    ("body", "reads", "reads_flat"),
    [
        (lambda s, x, y: x.size(0), False, False),
        (lambda s, x, y: x.size(3), False, True),
        (lambda s, x, y: x.size(-1), False, True),
        (lambda s, x, y: x.size(1), True, True),
        (lambda s, x, y: x.shape[2], True, True),  # this is the index, which reads a shape
        (lambda s, x, y: x.shape, True, True),  # who knows which
    ],
)
def test_sizes_that_are_the_same_for_any_number_of_channels(
    body, reads: bool, reads_flat: bool
) -> None:
    node, _ = last(body)
    source = node.all_input_nodes[0]
    assert ops.reads_no_channels(node, set()) == (not reads)
    assert ops.reads_no_channels(node, {source}) == (not reads_flat)


def test_a_shape_of_which_one_size_is_asked() -> None:
    for index, wanted in ((0, True), (2, True), (-1, True), (1, False)):
        node, _ = last(lambda s, x, y, index=index: x.shape[index])
        assert ops.reads_no_channels(node.args[0], set()) == wanted
        assert ops.reads_no_channels(node.args[0], {node.args[0].args[0]}) == (index == 0)


@pytest.mark.parametrize(
    ("call", "target", "arguments", "overwrites", "twin"),
    [
        ("call_method", "relu_", (), True, "relu"),
        ("call_method", "relu", (), False, None),
        ("call_method", "add_", (2,), True, "add"),
        ("call_method", "clamp_", (0,), True, "clamp"),
        ("call_method", "__imul__", (2,), True, None),
        ("call_method", "__mul__", (2,), False, None),
        ("call_function", operator.iadd, (2,), True, operator.add),
        ("call_function", operator.imul, (2,), True, operator.mul),
        ("call_function", operator.ior, (2,), True, None),
        ("call_function", operator.add, (2,), False, None),
        ("call_function", operator.inv, (), False, None),  # not n(v) in place
        ("call_function", operator.index, (), False, None),
        ("call_function", torch.relu_, (), True, None),
        ("call_function", F.relu, (True,), True, F.relu),
        ("call_function", F.relu, (False,), False, None),
        ("call_function", F.relu, (), False, None),
    ],
)
def test_what_overwrites_its_argument_and_its_twin(
    call: str, target: Any, arguments: tuple[Any, ...], overwrites: bool, twin: Any
) -> None:
    graph = fx.Graph()
    node = graph.create_node(call, target, (graph.placeholder("x"), *arguments))
    assert ops.inplace(node, {}) == overwrites
    if overwrites:
        elsewhere = ops.out_of_place(node)
        assert (elsewhere and elsewhere[0]) == twin


class Mismatched(nn.Module):
    """A BatchNorm for other channels than its convolution writes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))  # type: ignore[no-any-return]


def test_a_layer_that_refuses_what_it_is_given_is_not_traced() -> None:
    with pytest.raises(GraphError, match="refuses images of 3x32x32"):
        trace(Mismatched(), (3, 32, 32))
