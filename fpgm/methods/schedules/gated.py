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
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.graph.flow import tails
from fpgm.graph.trace import trace
from fpgm.networks.weights import weight_of
from fpgm.pruning.gates import Gate, gated
from fpgm.pruning.method import Goal, Task, Trained
from fpgm.pruning.settling import Settle, Share
from fpgm.pruning.silence import Silence
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
        graph = trace(self._model, task.image)
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


def _weight(network: nn.Module, name: str) -> Tensor:
    weight = weight_of(network, name)
    return weight.detach()


def _lengths(network: nn.Module, name: str) -> Tensor:
    """Euclidean norms of a convolution's filters, (N,)."""
    lengths: Tensor = torch.linalg.vector_norm(_weight(network, name).flatten(1), dim=1)
    return lengths


def growth(share: float) -> float:
    """Of the rate, after a share of the epochs in which it grows: (1 - e^(-bt)) / (1 - e^(-bT))."""
    return -math.expm1(-_BEND * min(share, 1.0)) / -math.expm1(-_BEND)
