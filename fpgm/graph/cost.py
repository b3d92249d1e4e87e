"""What a network costs, counted on the network itself: multiply-accumulates and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fpgm.graph import operations as ops
from fpgm.graph.groups import prunable
from fpgm.graph.trace import ChannelGraph, evaluating
from fpgm.networks.layers import BorderConv2d


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer. filters: its outputs; macs: for one image."""

    name: str
    filters: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """macs: multiply-accumulates of convolutions and linear layers for one image.

    macs_per_batch: done once however many images a batch has (the maps of constant channels);
    params: parameters, and the constants that compaction folded in.
    """

    macs: int
    macs_per_batch: int
    params: int
    layers: tuple[Layer, ...]


def cost(model: nn.Module, image: tuple[int, int, int]) -> Cost:
    """Count a network on one image of shape (C, H, W). The network is left as it is."""
    layers: list[Layer] = []
    per_batch = 0

    def count(name: str, module: nn.Conv2d | nn.Linear, output: Tensor) -> None:
        nonlocal per_batch
        weight = module.weight
        positions = output.numel() // weight.shape[0]  # pixels of one feature map; 1 if linear
        layers.append(Layer(name, weight.shape[0], weight.numel() * positions))
        if isinstance(module, BorderConv2d) and module.border is not None:
            per_batch += module.border.numel() * positions

    hooks = [
        module.register_forward_hook(lambda m, _, output, name=name: count(name, m, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    parameter = next(model.parameters())
    try:
        with evaluating(model), torch.inference_mode():
            model(torch.zeros(1, *image, dtype=parameter.dtype, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    constants = [b for n, b in model.named_buffers() if n.endswith((".border", ".constant"))]
    params = sum(t.numel() for t in [*model.parameters(), *constants])
    return Cost(sum(layer.macs for layer in layers), per_batch, params, tuple(layers))


def paper_reduction(graph: ChannelGraph, layers: Mapping[str, int], rate: float) -> float | None:
    """The papers' closed form: percent of MACs saved at a fractional `rate`, or None.

    layers: convolution -> dense MACs. A convolution counts 1 - rate if its filters are pruned,
    times 1 - rate if it reads a pruned convolution directly; a residual stream counts as full.
    Linear layers are not counted. None where channels are concatenated or reach a convolution
    through an operation that is not understood: the papers have no form for that.
    """
    kept = 0.0
    keep = 1 - rate
    tied = prunable(graph)
    if any(graph.kinds[node] == ops.DEPTHWISE for node, _ in graph.convolutions()) or (
        set(graph.kept_full) - {name for _, name in graph.convolutions()}
    ):
        return None  # depthwise, grouped or shared convolutions
    for node, name in graph.convolutions():
        source = graph.writer(node.all_input_nodes[0])
        kind = graph.kinds[source]
        if kind not in (ops.CONV, ops.ADD) and source.op != "placeholder":
            return None
        reads = keep if kind == ops.CONV and source.target in tied.layers else 1.0
        kept += layers[name] * reads * (keep if name in tied.layers else 1.0)
    return 100 * (1 - kept / sum(layers[name] for _, name in graph.convolutions()))
