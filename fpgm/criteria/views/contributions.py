"""View of what each channel contributes to the next layer's outputs, at sampled places."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.criteria.views.readers import Reader, places, readers
from fpgm.criteria.views.view import Collector, View
from fpgm.graph.trace import ChannelGraph
from fpgm.graph.tracer import Image
from fpgm.networks.layers import SameConv2d, padded


@dataclass(frozen=True)
class Contributions(View):
    """The Gram matrix X^T X of what the layer's channels contribute to the layers that read them
    (ThiNet, Luo et al., ICCV 2017). (N, N), of an image; those of several readers added.

    Row m of X, (samples, N), is one output of a reader at one position for one image, x_mc =
    sum_k W[n, c, k] x[c, k] its share that comes through channel c: without the bias the output is
    their sum. positions: of each image, drawn with a generator of their own, each with one output.
    """

    positions: int = 10
    part: ClassVar[str | None] = "layer that reads its channels"
    reads_images: ClassVar[bool] = True

    def scored(self, graph: ChannelGraph) -> set[str]:
        read = (places(reader.writers) for reader in readers(graph))
        return {layer for layers in read for layer in layers}

    def part_of(self, values: Tensor, filters: Tensor) -> Tensor:
        return values[filters][:, filters]

    def given(self, options: Mapping[str, Any]) -> Contributions:
        return replace(self, positions=options.get("positions", self.positions))

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        return _OfLayers(graph, layers, self.positions)


class Grams(Collector):
    """Of each reader, by the channels of its input: (C, C) float64 on the network's device, the
    mean over images. outputs: reader -> those that are sampled, of one that is not named all."""

    def __init__(
        self,
        read: Iterable[Reader],
        positions: int,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.readers = {reader.node: reader for reader in read}
        self.entered = frozenset(self.readers)
        self._positions, self._outputs = positions, outputs or {}
        self._sums: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[int, int]] = {}  # batches, images

    def enter(self, node: fx.Node, value: Tensor) -> None:
        reader = self.readers[node]
        batches, images = self._seen.get(reader.name, (0, 0))
        self._seen[reader.name] = (batches + 1, images + len(value))
        # Neither torch's own random numbers nor what else is asked for may change the samples.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{reader.name}/{batches}".encode()))
        outputs = self._outputs.get(reader.name, torch.arange(len(reader.layer.weight)))
        with torch.no_grad():
            found = sampled(reader, value.detach(), self._positions, outputs, generator)
            gram = found.T @ found
        self._sums[reader.name] = self._sums.get(reader.name, 0) + gram

    def samples(self) -> dict[str, int]:
        """How many rows X has."""
        return {name: images * self._positions for name, (_, images) in self._seen.items()}

    def grams(self) -> dict[str, Tensor]:
        return {name: total / self._seen[name][1] for name, total in self._sums.items()}

    def values(self) -> Mapping[str, Tensor]:
        return {name: gram.cpu() for name, gram in self.grams().items()}


class _OfLayers(Grams):
    """The same by the filters of the layers that write the channels. (N, N)"""

    def __init__(self, graph: ChannelGraph, layers: Sequence[str], positions: int) -> None:
        self._layers = {layer: graph.filters(layer) for layer in layers}
        read = [r for r in readers(graph) if self._layers.keys() & places(r.writers).keys()]
        super().__init__(read, positions)

    def values(self) -> Mapping[str, Tensor]:
        grams = super().values()
        found = {
            layer: torch.zeros(filters, filters, dtype=torch.float64)
            for layer, filters in self._layers.items()
        }
        for reader in self.readers.values():
            for layer, (channels, filters) in places(reader.writers).items():
                if layer in found and reader.name in grams:
                    of_layer = grams[reader.name][channels][:, channels]
                    rows = torch.zeros(len(found[layer]), len(filters), dtype=torch.float64)
                    # A filter may write several of the channels.
                    found[layer].index_add_(1, filters, rows.index_add_(0, filters, of_layer))
        return found


def sampled(
    reader: Reader, value: Tensor, positions: int, outputs: Tensor, generator: torch.Generator
) -> Tensor:
    """What each channel contributes to one of `outputs` at each of so many positions of every
    image. value: what the reader is given, (B, C, H, W), or (B, ..., features) of a linear layer.
    Returns (B * positions, C) float64."""
    count = len(value) * positions
    chosen = outputs[torch.randint(len(outputs), (count,), generator=generator)].to(value.device)
    # In [0, 1), whatever the size of what comes out.
    at = torch.rand(2, count, generator=generator, dtype=torch.float64).to(value.device)
    image = torch.arange(len(value), device=value.device).repeat_interleave(positions)
    weight = reader.layer.weight.detach()[chosen].double()
    channels = len(reader.writers)
    if isinstance(reader.layer, nn.Linear):
        rows = value.reshape(len(value), -1, value.shape[-1])
        read = rows[image, (at[0] * rows.shape[1]).long()].double()
        products: Tensor = (read * weight).view(count, channels, -1).sum(2)
        return products
    patches = _patches(reader.layer, value, image, at)
    by_group = patches.view(count, reader.layer.groups, -1, patches.shape[2])
    size = len(reader.layer.weight) // reader.layer.groups
    group = chosen // size
    every = torch.arange(count, device=value.device)
    read = by_group[every, group].double()
    found = torch.zeros(count, *by_group.shape[1:3], dtype=torch.float64, device=value.device)
    found[every, group] = (read * weight.flatten(2)).sum(2)
    return found.view(count, channels)


def _patches(conv: nn.Conv2d, value: Tensor, image: Tensor, at: Tensor) -> Tensor:
    """What the kernel meets at some positions. image: (n,) which of the batch; at: (2, n) where
    among the output's rows and columns, in [0, 1). Returns (n, C, kH * kW)."""
    value = _with_padding(conv, value)
    places = []
    for side in (0, 1):
        taps = torch.arange(conv.kernel_size[side], device=value.device) * conv.dilation[side]
        reach = (conv.kernel_size[side] - 1) * conv.dilation[side] + 1
        results = (value.shape[2 + side] - reach) // conv.stride[side] + 1
        places.append((at[side] * results).long()[:, None] * conv.stride[side] + taps)
    rows, columns = places
    found = value[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.flatten(1, 2).transpose(1, 2)


def _with_padding(conv: nn.Conv2d, value: Tensor) -> Tensor:
    if isinstance(conv, SameConv2d):
        return padded(value, conv)
    pad = list(conv._reversed_padding_repeated_twice)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(value, pad, mode=mode) if any(pad) else value
