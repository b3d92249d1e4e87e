"""View of the images that filters respond to most: activation maximisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fpgm.criteria.views.view import Collector, View
from fpgm.errors import Error, first_line
from fpgm.graph.trace import ChannelGraph
from fpgm.graph.tracer import Image

AT_ONCE = 64  # filters, each with an image
NOISE, STEP = 0.1, 1.0  # deviation of the start; length of a step, of the start's


@dataclass(frozen=True)
class Preferred(View):
    """For each filter the image that it responds to most, of the images' shape or its middle of
    `pixels` a side, flattened: (N, C * H * W).

    From one start for all filters, small noise of a fixed seed, `steps` steps along the gradient of
    the mean of the filter's map, before BatchNorm. In eval mode, also of a network that has seen no
    image yet: a filter's image must not depend on those of others.
    """

    steps: int = 10
    pixels: int = 32
    needs_image: ClassVar[bool] = True

    def given(self, options: Mapping[str, Any]) -> Preferred:
        steps, pixels = options.get("steps", self.steps), options.get("pixels", self.pixels)
        return replace(self, steps=steps, pixels=pixels)

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        if image is None:
            raise Error(
                "image=None: images that filters prefer are of the images' size; give "
                "image=(C, H, W)"
            )
        channels, height, width = image
        smaller = (channels, min(height, self.pixels), min(width, self.pixels))
        return _Images(graph, layers, smaller, self)


class _Images(Collector):
    def __init__(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image, view: Preferred
    ) -> None:
        self._graph, self._layers, self._image, self._view = graph, layers, image, view

    def values(self) -> Mapping[str, Tensor]:
        parameter = next(self._graph.module.parameters())
        noise = torch.randn(
            1, *self._image, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        start = (NOISE * noise).to(parameter)
        nodes = {name: node for node, name in self._graph.writers()}
        found = {}
        for layer in self._layers:
            filters = torch.arange(self._graph.filters(layer), device=start.device)
            network = up_to(self._graph, nodes[layer])
            try:
                parts = [
                    climbed(network, start, chosen, self._view.steps)
                    for chosen in filters.split(AT_ONCE)
                ]
            except (RuntimeError, ValueError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise Error(
                    f"pixels={self._view.pixels}: {layer} cannot be shown images of that size "
                    f"({first_line(error)}); criterion.pixels={2 * self._view.pixels}"
                ) from error
            found[layer] = torch.cat(parts).flatten(1).double().cpu()
        return found


def up_to(graph: ChannelGraph, last: fx.Node) -> fx.GraphModule:
    """The traced network as far as one of its operations, whose result it returns; of the same
    layers."""
    shorter, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in _before(graph, last):
        copies[node] = shorter.node_copy(node, copies.__getitem__)
    shorter.output(copies[last])
    return fx.GraphModule(graph.module, shorter)


def _before(graph: ChannelGraph, last: fx.Node) -> Iterator[fx.Node]:
    for node in graph.kinds:
        yield node
        if node is last:
            return


def climbed(network: nn.Module, start: Tensor, filters: Tensor, steps: int) -> Tensor:
    """Images, (n, C, H, W), that some filters (n,) respond to more than to `start`, (1, C, H, W).
    network: images -> what all filters write, (n, N, ...)."""
    images = start.expand(len(filters), *start.shape[1:]).clone()
    length = STEP * torch.linalg.vector_norm(start)
    rows = torch.arange(len(filters), device=start.device)
    for _ in range(steps):
        images.requires_grad_()
        with torch.enable_grad():
            # A copy, as the network may overwrite its input.
            maps = network(images.clone())
            channels = maps if maps.dim() == 2 else maps.flatten(2).mean(2)
            (gradient,) = torch.autograd.grad(channels[rows, filters].sum(), images)
        norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1).view(-1, 1, 1, 1)
        # A filter of zeros prefers nothing.
        images = images.detach() + gradient * length / norms.where(norms != 0, 1)
    return images.detach()
