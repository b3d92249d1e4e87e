"""A soft schedule that loses nothing at the end: filters are gated, not zeroed, until they settle.

SFP's softness is that pruned filters go on learning; but behind a BatchNorm they grow back to full
size within an epoch, the network computes with them, and the next zeroing costs what they have come
to mean. Here a gate closes their feature maps instead: the network never computes with them, and
the gradient that the open gate would have passed on reaches them all the same (a straight-through
estimator, Bengio et al., 2013). There it ends: what lies before them learns from the network as it
computes. So a filter that would be of use gets better, and is chosen in place of another; and
closing it for good changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fpgm.errors import GraphError
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.pruning.method import Goal, Task, Trained
from fpgm.pruning.settling import Settle, Share
from fpgm.pruning.silence import Silence, Tail, tails
from fpgm.pruning.zeroing import Interval, Recalibrate, Zeroing

Every = Annotated[int, Field(ge=0, examples=["100"])]

_BEND = 2.75  # of the rate's curve: SMCP's b of 0.05 an epoch, times its 55 epochs


class Gated(Zeroing):
    """Chooses by the weights as they live, after epochs and steps; masks feature maps until the
    selection is settled, then silences what is pruned, weights, scales and shifts, and trains on.

    every: steps between two selections within an epoch, 0: none; growth: share of the epochs in
    which the rate grows to the one asked for, 0: it is that from the start; the rest as in Zeroing.
    """

    name: ClassVar[str] = "gated"
    silences: ClassVar[bool] = True
    cools_down: ClassVar[bool] = True

    def __init__(
        self,
        task: Task,
        *,
        interval: Interval = 1,
        every: Every = 0,
        growth: Share = 0.0,
        settle: Settle = 0.6,
        latest: Share = 0.6,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        """Raises GraphError where gates cannot be put into the network."""
        super().__init__(
            task, interval=interval, zero_at_start=growth == 0, settle=settle, latest=latest,
            recalibrate=recalibrate, train_compact=train_compact,
        )  # fmt: skip
        self._every, self._growth, self._step = every, growth, 0
        graph = trace(self._model)
        self._tails = tails(graph)
        self._gates: dict[str, Gate] = {}
        self._closed = False  # whether what is pruned has been silenced
        if task.goal.prunes:
            network, self._gates = gated(graph, self._tails, list(task.prunable.layers))
            self._gated = Trained(network, task.full.optimizer)

    def share_before(self) -> float | None:
        share = self.grown(0.0)
        return share if share > 0 else None

    def share_after(self, epoch: int) -> float | None:
        share = super().share_after(epoch)
        # At the last selection nothing may be left for later.
        return share if share is None or self.last(epoch) else self.grown(epoch + 1)

    def grown(self, epoch: float) -> float:
        """The share of the rate after so many epochs, in full once the growth is over."""
        if self._growth == 0 or self.settled(math.floor(epoch)):
            return 1.0
        return growth(epoch / (self._growth * self.task.epochs))

    def start(self) -> None:
        share = self.share_before()
        if share is not None:
            self._refuse_ties(self._choose(share))
        if self.settled(0):
            self._close()
        self._open()

    def before_epoch(self, epoch: int) -> None:
        self._step = 0
        self._open()
        super().before_epoch(epoch)
        self._watch_closed()
        self._epoch = epoch

    def after_backward(self) -> None:
        super().after_backward()
        if self._closed:
            self._silence.still()

    def after_step(self) -> None:
        self._step += 1
        if not self._closed:
            self._silence.restore()
        if self._closed or not self._every or self._step % self._every:
            return
        share = self.grown(self._epoch + self._step / self.task.steps)
        if share > 0 and self._gates:
            self._level()
            self._evidence = None
            self._choose(share)
            self._set_gates()
            self._watch_closed()

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        closed, self._open_now = self._closed, self._masks
        if not closed:
            self._level()
        columns = super().after_epoch(epoch)
        if not closed:
            # All of them have learnt; these are chosen again.
            pairs = ((mask, self._masks[name]) for name, mask in self._before.items())
            columns["revived"] = sum(int((before & ~now).sum()) for before, now in pairs)
        return columns

    def enforce(self, epoch: int, chosen: bool) -> bool:
        if self._closed:
            return super().enforce(epoch, chosen)
        if self.last(epoch):
            self._close()
        elif self._gates:
            self._set_gates()
        return any((mask != self._open_now[name]).any() for name, mask in self._masks.items())

    def finish(self) -> None:
        if not self._closed:
            self._close()
        super().finish()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "closed": self._closed}

    def resume(self, state: Any) -> None:
        super().resume(state)
        self._closed = state["closed"]

    @property
    def zeroed(self) -> nn.Module:
        return self._model if self._closed or not self._gates else self._gated.network

    @classmethod
    def problems(cls, goal: Goal, from_scratch: bool) -> list[str]:
        criterion = goal.rule.criterion
        if not goal.rule.scored_by.reads_images:
            return []
        return [
            f"schedule=gated: criterion={criterion} looks at images, through a network without "
            "gates, which is not the one that is trained; criterion=gm, or schedule=soft"
        ]

    def _open(self) -> None:
        """Train through the gates, while there are any."""
        if self._gates and not self._closed:
            self._set_gates()
            if self.task.trained is not self._gated:  # what is compiled stays compiled
                self.task.train(self._gated)

    def _watch_closed(self) -> None:
        """Of a filter behind a closed gate the weights learn and nothing else; of one that is
        silenced nothing does."""
        self._silence = Silence(self._masks, self._tails, self.task.trained, self._closed)
        if not self._closed:
            self._silence.freeze()
        self._lengths = {name: _lengths(self._model, name) for name in self._masks}

    @torch.no_grad()
    def _level(self) -> None:
        """Filters behind closed gates get back the length that they had, in terms of the others'.

        The gradient of a closed gate is never answered: it goes on pointing one way. Behind a
        BatchNorm length says nothing, but criteria look at it.
        """
        for name, mask in self._masks.items():
            if not self._tails[name].norms or not mask.any() or mask.all():
                continue
            weight, before = _weight(self._model, name), self._lengths[name]
            now = _lengths(self._model, name)
            others = now[~mask].mean() / before[~mask].mean()
            factors = torch.where(mask & (now > 0), before * others / now, torch.ones_like(now))
            weight.mul_(factors.view(-1, 1, 1, 1))

    def _set_gates(self) -> None:
        for name, gate in self._gates.items():
            gate.mask.copy_((~self._masks[name]).view(1, -1, 1, 1))

    def _close(self) -> None:
        """Nothing that the network computes is changed by this."""
        Silence(self._masks, self._tails, self.task.full).scale(0.0)
        self.task.train(self.task.full)
        self._closed = True


class Gate(nn.Module):
    """Feature maps (B, N, H, W) times a mask of zeros and ones (1, N, 1, 1); the gradient goes
    through as if all of it were ones."""

    mask: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, len(like), 1, 1, device=like.device))

    def forward(self, maps: Tensor) -> Tensor:
        through: Tensor = _StraightThrough.apply(maps, self.mask.to(maps.dtype))
        return through


class GatedConv(nn.Module):
    """A convolution whose filters all learn, and whose input hears of those alone that `gate` lets
    through."""

    def __init__(self, conv: nn.Conv2d, gate: Gate) -> None:
        super().__init__()
        self.conv, self.gate = conv, gate

    def forward(self, images: Tensor) -> Tensor:
        conv, kind = self.conv, images.device.type
        weight, bias, mask = conv.weight, conv.bias, self.gate.mask
        if torch.is_autocast_enabled(kind):  # which does not look into a function of one's own
            dtype = torch.get_autocast_dtype(kind)
            images, weight = images.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        maps: Tensor = _Convolution.apply(images, weight, bias, mask.to(weight.dtype), how)
        return maps


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, mask: Tensor) -> Tensor:
        return maps * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, how: Any
    ) -> Tensor:
        ctx.save_for_backward(images, weight, mask)
        ctx.how, ctx.biased = how, bias is not None
        return F.conv2d(images, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        images, weight, mask = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how

        def part(of: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                of, images, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups,
                wanted,
            )  # fmt: skip

        back = None
        if ctx.needs_input_grad[0]:
            back = part(gradient * mask, (True, False, False))[0]
        _, for_weight, for_bias = part(gradient, (False, True, ctx.biased))
        return back, for_weight, for_bias, None, None


def gated(
    graph: ChannelGraph, behind: Mapping[str, Tail], layers: Sequence[str]
) -> tuple[nn.Module, dict[str, Gate]]:
    """The traced network, its parameters shared with the original, with a gate behind each of these
    convolutions, its BatchNorm and its activation. Raises GraphError."""
    for node in graph.kinds:
        function = str(node.target) if node.op == "call_function" else ""
        if "dropout" in function or "stochastic_depth" in function:
            raise GraphError(
                f"schedule=gated: {node.name} is a function and was traced as it is in evaluation; "
                "use the layer (nn.Dropout) in place of it, or schedule=fade"
            )
    network, gates = graph.module, {}
    nodes = {name: node for node, name in graph.convolutions()}
    for number, name in enumerate(layers):
        conv, last = network.get_submodule(name), behind[name].last
        assert isinstance(conv, nn.Conv2d)
        gates[name] = gate = Gate(conv.weight)
        network.add_submodule(f"gate_{number}", gate)
        network.add_submodule(f"gated_{number}", GatedConv(conv, gate))
        with network.graph.inserting_after(last):
            closing = network.graph.call_module(f"gate_{number}", (last,))
        last.replace_all_uses_with(closing)
        closing.args = (last,)
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            nodes[
                name
            ].target = f"gated_{number}"  # others are rare, and learn by what is masked too
    network.recompile()
    return network, gates


def _weight(network: nn.Module, name: str) -> Tensor:
    weight = network.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _lengths(network: nn.Module, name: str) -> Tensor:
    """Euclidean norms of a convolution's filters, (N,)."""
    lengths: Tensor = torch.linalg.vector_norm(_weight(network, name).flatten(1), dim=1)
    return lengths


def growth(share: float) -> float:
    """Of the rate, after a share of the epochs in which it grows: (1 - e^(-bt)) / (1 - e^(-bT))."""
    return -math.expm1(-_BEND * min(share, 1.0)) / -math.expm1(-_BEND)
