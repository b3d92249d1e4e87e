"""The accuracy of a network of which one layer is changed, without running the rest anew.

What stands before a layer does not depend on it: images are run up to it once, and from there for
each change of it. So is what BatchNorm is estimated on, as that of the layers before is the same
whatever is done to this one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fpgm.graph.trace import ChannelGraph, trace
from fpgm.graph.tracer import Image
from fpgm.machine.device import autocast
from fpgm.selection.zero import pruned

Batches = Sequence[tuple[Tensor, Tensor]]  # (B, C, H, W) normalised images and (B,) labels
Norm = nn.BatchNorm1d | nn.BatchNorm2d
HELD = 2 * 2**30  # bytes of maps that are held for each of three passes, at most


class Probe:
    """Two copies of a network: one with BatchNorm as it is, one in which it is estimated again.

    shown: batches that the accuracy is measured on; training: batches that BatchNorm is estimated
    on, their labels unused; precision: see autocast. The network given is left as it is, and what
    is said of a change does not depend on what was asked before.
    """

    def __init__(
        self, model: nn.Module, shown: Batches, training: Batches, precision: torch.dtype | None
    ) -> None:
        self._device, self._precision = next(model.parameters()).device, precision
        self._labels = torch.cat([labels for _, labels in shown])
        inputs = [images for images, _ in shown]
        # In this order: what estimates BatchNorm goes ahead of what is measured with it.
        channels, height, width = inputs[0].shape[1:]
        image = (channels, height, width)
        again = _traced(model, image)
        self._learning = _Pass(again, [images for images, _ in training], learns=True)
        self._again = _Pass(again, inputs)
        self._plain = _Pass(_traced(model, image), inputs)
        self._passes = (self._learning, self._again, self._plain)
        self._places = {name: place for place, name in self._plain.writers()}

    @property
    def estimates(self) -> bool:
        """Whether there is a BatchNorm, so that the two accuracies may differ."""
        return bool(self._learning.norms(0))

    @torch.inference_mode()
    def accuracies(self, keep: Mapping[str, Tensor]) -> tuple[float, float]:
        """With the filters outside `keep` zeroed (convolution -> kept filters; others stay whole):
        in percent, BatchNorm as it is and estimated again."""
        self._reach(min((self._places[name] for name in keep), default=0))
        plain = self._accuracy(self._plain, keep)
        if not self.estimates:
            return plain, plain
        with _zeroed(self._learning.module, keep), autocast(self._device, self._precision):
            self._learning.estimate()
        return plain, self._accuracy(self._again, keep)

    def _accuracy(self, images: _Pass, keep: Mapping[str, Tensor]) -> float:
        # A context of its own for each: autocast remembers weights that it has cast.
        with _zeroed(images.module, keep), autocast(self._device, self._precision):
            outputs = torch.cat(list(images.outputs()))
        return 100 * int((outputs.argmax(1) == self._labels).sum()) / len(self._labels)

    def _reach(self, place: int) -> None:
        """Run all images up to a node, where what is there can be held."""
        if place < self._plain.place:
            for images in self._passes:
                images.restart()
        with autocast(self._device, self._precision):
            if all(images.bytes_at(place) <= HELD for images in self._passes):
                for images in self._passes:
                    images.advance(place)


class _Pass:
    """Batches on their way through a network: what is there of each before the node `place`."""

    def __init__(self, graph: ChannelGraph, inputs: Sequence[Tensor], learns: bool = False) -> None:
        self.module = graph.module
        self._graph, self._inputs, self._learns = graph, inputs, learns
        self._runner = fx.Interpreter(graph.module)
        self._nodes = list(graph.kinds)
        # A BatchNorm that is called twice is before a layer and behind it.
        calls = [name for _, name in self._norm_calls()]
        self._cuts = len(calls) == len(set(calls))
        self.restart()

    def restart(self) -> None:
        """Back to the images."""
        source = next(node for node in self._nodes if node.op == "placeholder")
        self._there: list[dict[fx.Node, object]] = [{source: images} for images in self._inputs]
        self.place = 0

    def writers(self) -> Iterator[tuple[int, str]]:
        """The place of each among the nodes, and its name."""
        places = {node: place for place, node in enumerate(self._nodes)}
        return ((places[node], name) for node, name in self._graph.writers())

    def norms(self, start: int, stop: int | None = None) -> list[Norm]:
        """The BatchNorms that are called between two places."""
        stop = len(self._nodes) if stop is None else stop
        names = [name for place, name in self._norm_calls() if start <= place < stop]
        return [self.module.get_submodule(name) for name in names]  # type: ignore[misc]

    def _norm_calls(self) -> Iterator[tuple[int, str]]:
        for place, node in enumerate(self._nodes):
            layer = self._graph.called(node)
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats:
                yield place, str(node.target)

    def bytes_at(self, place: int) -> int:
        """What would have to be held there."""
        if place <= self.place or not self._cuts:
            return 0
        first = self._run(self._there[0], place)
        held = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
        return held * len(self._there)

    def advance(self, place: int) -> None:
        """Go on to a node, with the network as it stands."""
        if place > self.place and self._cuts:
            with _learning(self.norms(self.place, place) if self._learns else ()):
                self._there = [self._run(values, place) for values in self._there]
            self.place = place

    def estimate(self) -> None:
        """Estimate all BatchNorms behind `place` again: the average of all batches' statistics."""
        with _learning(self.norms(self.place)):
            for _ in self.outputs():
                pass

    def outputs(self) -> Iterator[Tensor]:
        """Of each batch, (B, classes)."""
        for values in self._there:
            yield self._run(values, len(self._nodes))[self._nodes[-1]]  # type: ignore[misc]

    def _run(self, values: dict[fx.Node, object], place: int) -> dict[fx.Node, object]:
        """From what is there to what will be there; of the last node only that."""
        there = list(values.values())
        if any(self._graph.overwritten.values()):
            there = copy.deepcopy(there)  # in one go: two names of one tensor stay that
        now = dict(zip(values, there, strict=True))
        runner = self._runner
        runner.env = now
        for node in self._nodes[self.place : place]:
            if node.op != "placeholder":
                now[node] = runner.run_node(node)
            for old in runner.user_to_last_uses.get(node, ()):
                now.pop(old, None)
        return now


def _traced(model: nn.Module, image: Image) -> ChannelGraph:
    """A copy of its own, in eval mode."""
    return trace(copy.deepcopy(model).eval().requires_grad_(False), image)


@contextlib.contextmanager
def _learning(norms: Sequence[Norm]) -> Iterator[None]:
    """Inside, these estimate their statistics from nothing as a cumulative average, and normalise
    by each batch's own, as torch's update_bn has it; all else is as in eval mode."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False


@contextlib.contextmanager
def _zeroed(model: nn.Module, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the filters outside `keep` are zero; afterwards they are as before, to the bit."""
    masks = pruned(model, keep)
    weights = {name: model.get_parameter(f"{name}.weight") for name in masks}
    before = {name: weights[name][mask].clone() for name, mask in masks.items()}
    try:
        for name, mask in masks.items():
            weights[name][mask] = 0
        yield
    finally:
        for name, mask in masks.items():
            weights[name][mask] = before[name]
