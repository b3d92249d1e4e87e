"""Frozen runs train the compact network: what is pruned before the first epoch stays pruned.

A filter that is zero and masked, with BatchNorm and ReLU behind it and a shift of zero, writes
zeros and gets no gradient; nor does its shift, nor do the weights that read it. So the network
without it takes exactly the same steps. What is left out shrinks by weight decay and momentum
alone, a linear recursion that `write_back` makes up for in closed form. A filter that writes into
a residual stream is not dead, its shift is learnt: it stays, as zeros, and so do as many others as
make a width that trains fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fpgm.compaction.ballast import rounded, streams, widened
from fpgm.compaction.constants import Analysis, analyse
from fpgm.compaction.rewriting import rewrite
from fpgm.graph import operations as ops
from fpgm.graph.cost import cost
from fpgm.graph.flow import is_relu
from fpgm.graph.groups import Group
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.methods.method import Method, Schedule, Task, Trained

Place = tuple[Tensor, ...] | EllipsisType  # of the compact parameter's entries in the full one

MULTIPLE = 8  # of channels: others take longer than they save
WORTH = 0.75  # of the MACs: above it, time is not saved either (docs/performance.md)


class CompactTraining(Method):
    """Trains the compact network in place of the one at full width, wherever that is exact."""

    def __init__(self, task: Task, schedule: Schedule) -> None:
        super().__init__(task)
        self._schedule = schedule
        self._keep: Mapping[str, Tensor] | None = None
        self._compacted: Compacted | None = None
        self._steps = 0

    def before_epoch(self, epoch: int) -> None:
        self._steps, keep = 0, self._schedule.keep
        before = self._keep
        if before is not None and all(torch.equal(keep[name], before[name]) for name in keep):
            return  # what is compiled stays compiled
        full = self.task.full
        groups, image = self.task.prunable.groups, self.task.image_shape
        self._keep = keep
        self._compacted = compacted(full.network, full.optimizer, keep, groups, image)
        self.task.train(full if self._compacted is None else self._compacted.trained)

    def after_step(self) -> None:
        self._steps += 1

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        if self._compacted is not None:
            self._compacted.write_back(self._steps)
        return {}


class Compacted:
    """trained: the compact network that is trained in place of `model`, and its optimizer."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.SGD,
        network: nn.Module,
        places: Mapping[str, Place],
    ) -> None:
        network = network.train().to(memory_format=torch.channels_last)
        narrow = torch.optim.SGD(network.parameters(), **optimizer.defaults)
        self._model, self._full, self._places = model, optimizer, places
        self.trained = Trained(network, narrow, dict(_rows(places)))
        full = dict(model.named_parameters())
        for name, parameter in network.named_parameters():
            buffer = optimizer.state[full[name]].get("momentum_buffer")
            if buffer is not None:
                part = torch.empty_like(parameter).copy_(buffer[places[name]])
                narrow.state[parameter]["momentum_buffer"] = part

    @torch.no_grad()
    def write_back(self, steps: int) -> None:
        """Bring the full-width network and its optimizer to where `steps` steps have led."""
        (keeps, drifts), (gains, lasts) = _decay(
            self.trained.optimizer.param_groups[0], steps
        ).tolist()
        trained = dict(self.trained.network.named_parameters())
        for name, full in self._model.named_parameters():
            place, state = self._places[name], self._full.state[full]
            before = state.get("momentum_buffer", torch.zeros_like(full))
            value = keeps * full + drifts * before
            momentum = gains * full + lasts * before
            value[place] = trained[name]
            buffer = self.trained.optimizer.state[trained[name]].get("momentum_buffer")
            if buffer is not None:
                momentum[place] = buffer
                state["momentum_buffer"] = momentum
            full.copy_(value)
        buffers = dict(self.trained.network.named_buffers())
        for name, module in self._model.named_modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                for kind in ("running_mean", "running_var"):
                    full = getattr(module, kind)
                    full *= (1 - (module.momentum or 0)) ** steps  # of a channel that is all zeros
                    full[self._places[f"{name}.{kind}"]] = buffers[f"{name}.{kind}"]
                module.num_batches_tracked = buffers[f"{name}.num_batches_tracked"].clone()


def _rows(places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """Convolution -> the filters of the full one that the compact one has."""
    for name, place in places.items():
        if name.endswith(".weight") and isinstance(place, tuple) and place[0].dim() >= 1:
            yield name.removesuffix(".weight"), place[0].flatten()


def compacted(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    keep: Mapping[str, Tensor],
    groups: Iterable[Group],
    image: tuple[int, int, int],
) -> Compacted | None:
    """The compact network of a model whose filters outside `keep` are zero and stay so.

    None where training it would not take exactly the same steps, or hardly less time. groups: what
    was selected together; image: (C, H, W), to count MACs.
    """
    graph = trace(model)
    keep = {name: kept.cpu() for name, kept in keep.items()}
    # Streams at their full width and widths that train fast: the adds' scatter costs more.
    chosen = streams(graph, keep)
    ballast = widened(graph, keep, {}, chosen)
    ballast = widened(graph, keep, rounded(graph, keep, ballast, groups, MULTIPLE), chosen)
    analysis = analyse(graph, keep, ballast)
    dense = cost(model, image)
    if analysis.macs(dense) > WORTH * dense.macs:
        return None
    if not _silent(analysis) or not _all_dead(analysis):
        return None
    network, foldings = rewrite(analysis)
    for name, attribute in foldings:
        setattr(network.get_submodule(name), attribute, None)  # zeros, that would be learnt
    names = [{name for name, _ in m.named_parameters()} for m in (model, network)]
    if names[0] != names[1]:
        return None
    places: dict[str, Place] = dict.fromkeys(model.state_dict(), ...)
    places.update(_places(analysis))
    return Compacted(model, optimizer, network, places)


def _decay(group: Mapping[str, float], steps: int) -> np.ndarray:
    """What `steps` steps of SGD without a gradient do to (parameter, momentum): a matrix (2, 2)."""
    lr, mu, wd = group["lr"], group["momentum"], group["weight_decay"]
    momentum = np.array([wd, mu])  # of the new one, in terms of the old pair
    moved = np.array([wd, 0.0]) + mu * momentum if group["nesterov"] else momentum
    step = np.stack([np.array([1.0, 0.0]) - lr * moved, momentum])
    return np.linalg.matrix_power(step, steps)


def _places(analysis: Analysis) -> Iterator[tuple[str, Place]]:
    """Where the compact network's parameters and statistics lie in those of the full one."""
    graph = analysis.graph
    for node, kind in graph.kinds.items():
        name, written = str(node.target), analysis.flow.written[node]
        if kind in (ops.CONV, ops.DEPTHWISE) and written is not None:
            read = analysis.inputs(node).live
            rows = (written.live[:, None], read[None]) if kind == ops.CONV else (written.live,)
            yield f"{name}.weight", rows
            yield f"{name}.bias", (written.live,)
        elif kind == ops.NORM and written is not None:
            for attribute in ("weight", "bias", "running_mean", "running_var"):
                yield f"{name}.{attribute}", (written.live,)
        elif kind == ops.LINEAR:
            read = analysis.inputs(node).live
            outputs = torch.arange(graph.filters(name), device=read.device)
            yield f"{name}.weight", (outputs[:, None], read[None])


def _silent(analysis: Analysis) -> bool:
    """Whether all that is read of what is left out is zero: nothing has to be folded in."""
    kinds = (ops.CONV, ops.LINEAR)
    layers = [node for node, kind in analysis.graph.kinds.items() if kind in kinds]
    read = [analysis.inputs(node) for node in layers]
    read += [expansion.channels for expansion in analysis.widened()]
    return not any(channels.absent.any() for channels in read)


def _all_dead(analysis: Analysis) -> bool:
    """Whether no gradient can ever reach a channel that is left out."""
    graph = analysis.graph
    for node, kind in graph.kinds.items():
        channels = analysis.flow.written[node]
        if node.op == "call_function" and "dropout" in str(node.target):
            return False  # traced in eval mode: it would never drop anything
        if channels is None or channels.whole or kind not in (ops.CONV, ops.DEPTHWISE, ops.NORM):
            continue
        if kind == ops.NORM:
            absent = torch.ones(channels.total, dtype=torch.bool, device=channels.live.device)
            absent[channels.live] = False
            norm = graph.module.get_submodule(str(node.target))
            if not _rests(norm, absent) or not _rectified(node, graph):
                return False
        elif any(graph.kinds[user] != ops.NORM for user in node.users):
            return False
    return all(_from_relu(expansion.source, analysis) for expansion in analysis.widened())


def _rests(norm: nn.Module, absent: Tensor) -> bool:
    """Whether a BatchNorm hands the zeros of these channels on as what ReLU makes zero, in training
    and in evaluation."""
    shift, mean = norm.bias, norm.running_mean
    assert isinstance(shift, Tensor)
    assert isinstance(mean, Tensor)
    return bool((shift[absent] <= 0).all() and (mean[absent] == 0).all() and norm.momentum)


def _rectified(node: fx.Node, graph: ChannelGraph) -> bool:
    """Whether all that reads a node is a ReLU, at once or behind adds."""
    return all(
        is_relu(user, graph) or (graph.kinds[user] == ops.ADD and _rectified(user, graph))
        for user in node.users
    )


def _from_relu(node: fx.Node, analysis: Analysis) -> bool:
    """Whether what is absent from a node was zeroed by a ReLU or never there."""
    kinds = analysis.graph.kinds
    while kinds[node] in (ops.SLICE, ops.POOL, ops.PAD):
        node = node.all_input_nodes[0]
    channels = analysis.flow.written[node]
    return (channels is not None and channels.whole) or is_relu(node, analysis.graph)
