"""Where pruned filters are held at zero, the compact network is trained in place of the full one.

A filter that is zero and masked, with BatchNorm and ReLU behind it and a shift that is not above
zero, writes zeros and gets no gradient; nor does its shift, nor do the weights that read it. So the
network without it takes exactly the same steps. What is left out shrinks by weight decay and
momentum alone, a linear recursion that `write_back` makes up for. Others are not dead: those that
write into a residual stream, whose shift is learnt unless the schedule silences it, and those of a
trained network whose shift is above zero. They stay, as zeros, and so do as many more as make a
width that trains fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpgm.compaction.ballast import rounded, streams, widened
from fpgm.compaction.constants import Analysis, Channels, Keep, analyse
from fpgm.compaction.rewriting import rewrite
from fpgm.graph import operations as ops
from fpgm.graph.cost import cost
from fpgm.graph.flow import is_relu
from fpgm.graph.groups import Group
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.networks.modes import dropping
from fpgm.pruning.method import Method, Schedule, Task, Trained

Place = tuple[Tensor, ...] | EllipsisType  # of the compact parameter's entries in the full one

MULTIPLE = 8  # of channels: others take longer than they save
WORTH = 0.75  # of the MACs: above it, time is not saved either (docs/performance.md)


class CompactTraining(Method):
    """Trains the compact network in place of the one at full width, wherever that is exact."""

    def __init__(self, task: Task, schedule: Schedule, beside: Iterable[Method] = ()) -> None:
        super().__init__(task)
        self._schedule, self._others = schedule, [schedule, *beside]
        self._keep: Keep | None = None
        self._awake: Keep = {}
        self._compacted: Compacted | None = None

    def before_epoch(self, epoch: int) -> None:
        if not all(method.still_during(epoch) for method in self._others):
            if self._compacted is not None:
                self.task.train(self.task.full)
            self._keep = self._compacted = None
            return
        full, keep, held = self.task.full, self._schedule.keep, self._schedule.silences
        assert isinstance(full.optimizer, torch.optim.SGD)  # whose recursion `_decay` is
        # What a trained network's statistics keep alive falls asleep in the first epochs.
        on_cpu = {name: kept.cpu() for name, kept in keep.items()}
        graph = trace(full.network, self.task.image_shape)
        awake = _awake(graph, on_cpu, Motion(full.optimizer, held))
        if self._keep is not None and _same(self._keep, keep) and _same(self._awake, awake):
            return  # what is compiled stays compiled
        groups, image = self.task.prunable.groups, self.task.image_shape
        self._keep, self._awake = keep, awake
        self._compacted = compacted(full.network, full.optimizer, keep, groups, image, held)
        self.task.train(full if self._compacted is None else self._compacted.trained)

    def after_step(self) -> None:
        if self._compacted is not None:
            self._compacted.count_step()

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        if self._compacted is not None:
            self._compacted.write_back()
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
        self._decay, self._steps = np.eye(2), 0  # of what is left out, since it was written back
        full = dict(model.named_parameters())
        for name, parameter in network.named_parameters():
            buffer = optimizer.state[full[name]].get("momentum_buffer")
            if buffer is not None:
                part = torch.empty_like(parameter).copy_(buffer[places[name]])
                narrow.state[parameter]["momentum_buffer"] = part

    def count_step(self) -> None:
        """One step was taken, at the learning rate that the optimizer has."""
        self._decay = _decay(self.trained.optimizer.param_groups[0]) @ self._decay
        self._steps += 1

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring the full-width network and its optimizer to where the steps since the last time
        have led."""
        (keeps, drifts), (gains, lasts) = self._decay.tolist()
        steps = self._steps
        self._decay, self._steps = np.eye(2), 0
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


def _trains_alike(graph: ChannelGraph, model: nn.Module) -> bool:
    """Whether the traced network takes the same steps: with the model's own parameters, none of
    them used in another way, and BatchNorms that learn; and with nothing dropped at random by
    layers of somebody's own, which was traced as it is in evaluation."""
    kinds = {ops.GROUPED, ops.UNITS, ops.SLOPE, ops.FIXED}
    norms = (str(node.target) for node, kind in graph.kinds.items() if kind == ops.NORM)
    learning = (isinstance(model.get_submodule(name), _BatchNorm) for name in norms)
    own = {name for name, _ in graph.module.named_parameters()}
    return (
        not graph.computed
        and not kinds.intersection(graph.kinds.values())
        and not any(node.op == "get_attr" for node in graph.kinds)
        and all(learning)
        and own == {name for name, _ in model.named_parameters()}
        and dropping(model) is None
    )


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
    held: bool = False,
) -> Compacted | None:
    """The compact network of a model whose filters outside `keep` are zero and stay so.

    None where training it would not take exactly the same steps, or hardly less time. groups: what
    was selected together; image: (C, H, W), to count MACs; held: whether scales and shifts of
    pruned filters that are zero stay so, too.
    """
    graph, motion = trace(model, image), Motion(optimizer, held)
    if not _trains_alike(graph, model):
        return None
    keep = {name: kept.cpu() for name, kept in keep.items()}
    # Streams at their full width and widths that train fast: the adds' scatter costs more.
    chosen = streams(graph, keep)
    ballast = widened(graph, keep, _awake(graph, keep, motion), chosen)
    ballast = widened(graph, keep, rounded(graph, keep, ballast, groups, MULTIPLE), chosen)
    analysis = analyse(graph, keep, ballast)
    dense = cost(model, image)
    if analysis.macs(dense) >= WORTH * dense.macs:
        return None
    if not _silent(analysis) or not _all_dead(analysis, motion):
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


def _decay(group: Mapping[str, float]) -> np.ndarray:
    """What a step of SGD without a gradient does to (parameter, momentum): a matrix (2, 2)."""
    lr, mu, wd = group["lr"], group["momentum"], group["weight_decay"]
    momentum = np.array([wd, mu])  # of the new one, in terms of the old pair
    moved = np.array([wd, 0.0]) + mu * momentum if group["nesterov"] else momentum
    return np.stack([np.array([1.0, 0.0]) - lr * moved, momentum])


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


@dataclass(frozen=True)
class Motion:
    """What still moves without a gradient. optimizer: of the network at full width; held: whether
    scales and shifts of pruned filters that are zero stay so."""

    optimizer: torch.optim.SGD
    held: bool

    def drift(self, parameter: nn.Parameter) -> Tensor:
        """How far momentum alone can still carry each entry."""
        group = self.optimizer.defaults
        buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is None:
            return torch.zeros_like(parameter)
        drift: Tensor = group["lr"] / (1 - group["momentum"]) * buffer.abs()
        return drift


@torch.no_grad()
def _awake(graph: ChannelGraph, keep: Keep, motion: Motion) -> dict[str, Tensor]:
    """Streams in full, and the pruned filters that their BatchNorm keeps alive, as ballast."""
    found = widened(graph, keep, {}, streams(graph, keep))
    analysis = analyse(graph, keep, found)
    for node, name in graph.convolutions():
        norm = next(iter(node.users), node)
        channels = analysis.flow.written[norm]
        if name not in keep or graph.kinds[norm] != ops.NORM or channels is None:
            continue
        awake = _absent(channels) & ~_resting(norm, graph, motion)
        if awake.any() and _rectified(norm, graph):
            there = found.get(name, keep[name])
            found[name] = torch.cat((there, awake.nonzero().flatten())).unique()
    return found


def _same(a: Keep, b: Keep) -> bool:
    return a.keys() == b.keys() and all(torch.equal(kept, b[name]) for name, kept in a.items())


@torch.no_grad()
def _all_dead(analysis: Analysis, motion: Motion) -> bool:
    """Whether no gradient can ever reach a channel that is left out."""
    graph = analysis.graph
    for node, kind in graph.kinds.items():
        channels = analysis.flow.written[node]
        if node.op == "call_function" and "dropout" in str(node.target):
            return False  # traced in eval mode: it would never drop anything
        if channels is None or channels.whole or kind not in (ops.CONV, ops.DEPTHWISE, ops.NORM):
            continue
        if kind == ops.NORM:
            if (_absent(channels) & ~_resting(node, graph, motion)).any():
                return False
        elif any(graph.kinds[user] != ops.NORM for user in node.users):
            return False
    return all(_from_relu(expansion.source, analysis) for expansion in analysis.widened())


def _absent(channels: Channels) -> Tensor:
    """(total,) bool, True for the channels that are not computed."""
    absent = torch.ones(channels.total, dtype=torch.bool, device=channels.live.device)
    return absent.index_fill_(0, channels.live, False)


def _resting(node: fx.Node, graph: ChannelGraph, motion: Motion) -> Tensor:
    """Which channels (C,) of a BatchNorm hand zeros on as what stays zero, in training and in
    evaluation: those that ReLU makes so, and those that are silenced and held."""
    norm = graph.module.get_submodule(str(node.target))
    assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d)
    scale, shift, mean, var = norm.weight, norm.bias, norm.running_mean, norm.running_var
    conv = graph.called(node.all_input_nodes[0])
    biased = getattr(conv, "bias", None) is not None  # it would write its bias, and not zeros
    if not norm.affine or mean is None or var is None or not norm.momentum or biased:
        return torch.zeros(norm.num_features, dtype=torch.bool)
    # While only zeros come in, the mean's part of the output shrinks from step to step.
    size = scale.abs() + motion.drift(scale)
    most = shift + motion.drift(shift) + size * mean.abs() * (var + norm.eps).rsqrt()
    resting = (most <= 0) if _rectified(node, graph) else torch.zeros_like(most, dtype=torch.bool)
    return resting | ((scale == 0) & (shift == 0)) if motion.held else resting


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
