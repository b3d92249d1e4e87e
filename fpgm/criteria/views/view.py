"""What a view is: a declaration, and the collector that gathers what it declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fpgm.graph.trace import ChannelGraph
from fpgm.graph.tracer import Image


class Collector:
    """Gathers what one view shows, batch by batch. It keeps sums, and a batch until
    that is done.

    watched: the operations whose results it wants to see; entered: those whose inputs.
    """

    watched: frozenset[fx.Node] = frozenset()
    entered: frozenset[fx.Node] = frozenset()

    def enter(self, node: fx.Node, value: Tensor) -> None:
        """What an operation that is `entered` is given first, in each batch and as it is then."""

    def see(self, node: fx.Node, value: Tensor) -> None:
        """What a watched operation gives, in each batch and before anything overwrites it."""

    def sources(self) -> Sequence[Tensor]:
        """By what the loss of the batch is to be differentiated, once it has been computed."""
        return ()

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """The batch is done. gradients: of its mean cross-entropy by `sources`, None where the loss
        does not depend on one."""

    def values(self) -> Mapping[str, Tensor]:
        """Layer -> (N, ...) float64, on the CPU."""
        raise NotImplementedError


class View(ABC):
    """part: what must stand behind a convolution, in words, None where any will do; reads_images:
    whether batches are run through the network; differentiates: whether their loss's gradient is
    wanted; needs_image: whether the images' size must be known."""

    part: ClassVar[str | None] = None
    reads_images: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False
    needs_image: ClassVar[bool] = False

    def scored(self, graph: ChannelGraph) -> set[str]:
        """The convolutions that have what is looked at."""
        return {name for _, name in graph.writers()}

    def part_of(self, values: Tensor, filters: Tensor) -> Tensor:
        """What is seen of some filters, by their indices (n,): (N, ...) -> (n, ...)."""
        return values[filters]

    def joined(self, batches: Sequence[Tensor]) -> Tensor:
        """What is seen of several batches of one size, from what is of each, to a scale."""
        return torch.stack(list(batches)).mean(0)

    def given(self, options: Mapping[str, Any]) -> View:
        """The same as the options of its criterion want it."""
        return self

    @abstractmethod
    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        """Of these layers, which have what is looked at. image: (C, H, W) where it is known."""
