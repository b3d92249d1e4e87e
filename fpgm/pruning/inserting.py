"""Schedules that put modules of their own into the network, and choose by what these come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from fpgm.errors import Error
from fpgm.graph import operations as ops
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.machine.ranks import check_agreement
from fpgm.pruning.gates import put_behind, refuse_dropping
from fpgm.pruning.method import Task, Trained
from fpgm.pruning.zeroing import Zeroing
from fpgm.selection.rule import Rule


class Inserting(Zeroing):
    """Trains the network with a module behind the BatchNorm of each convolution that alone writes
    its channels; chooses among these convolutions by `measured`, in one ranking over the network
    but where the run says how much of each layer goes; and cuts when the last epoch is done. All
    other layers stay whole.

    modules: convolution -> its module; norms: -> the BatchNorm behind it.
    """

    asks_criterion: ClassVar[bool] = False
    at_once: ClassVar[bool] = False

    modules: dict[str, Any]
    norms: dict[str, nn.BatchNorm2d]

    def __init__(self, task: Task, *, recalibrate: int) -> None:
        """Raises Error for a network without such a convolution and for one without a BatchNorm,
        GraphError."""
        super().__init__(task, recalibrate=recalibrate, train_compact=False)
        self.modules, self.norms = {}, {}
        self._cut = not task.goal.prunes  # whether the network is a plain one
        if self._cut:
            return
        graph = trace(self._model, task.image)
        refuse_dropping(graph, f"schedule={self.name}")
        places = self._places(graph)
        for number, (name, (norm, node)) in enumerate(places.items()):
            self.norms[name], self.modules[name] = norm, self.made(norm)
            put_behind(graph.module, node, f"{self.name}_{number}", self.modules[name])
        graph.module.recompile()
        self._groups = tuple(g for g in task.prunable.groups if g.members[0][0] in places)
        self._inserted = Trained(graph.module, task.full.optimizer)

    # What they differ in.

    def made(self, norm: nn.BatchNorm2d) -> nn.Module:
        """The module for a convolution, by its BatchNorm."""
        raise NotImplementedError

    def place(self, norm: fx.Node, graph: ChannelGraph) -> fx.Node | None:
        """Behind which operation it goes, None where the layer cannot have one. norm: the BatchNorm
        that alone reads the convolution."""
        raise NotImplementedError

    def measured(self) -> dict[str, Tensor]:
        """Convolution -> (N,), those that have a module; the lowest go first."""
        raise NotImplementedError

    def gone(self) -> dict[str, Tensor]:
        """Convolution -> (N,) bool, of those: the channels that the network computes without
        already."""
        raise NotImplementedError

    # The moments.

    def start(self) -> None:
        if self._cut:
            return
        asked = self.task.goal.rule.criterion
        others = [name for name in self.task.prunable.layers if name not in self.modules]
        whole = f"; {len(others)} layers stay whole: {', '.join(others)}" if others else ""
        self.task.say(
            f"schedule={self.name}: chooses by a measure of its own among {len(self.modules)} "
            f"layers, criterion={asked} is not looked at{whole}"
        )
        self._open()

    def before_epoch(self, epoch: int) -> None:
        self._before = self._masks
        self._open()

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        """Returns columns of the history: `pruned` are the filters that would be cut now, `dead`
        those of them that the network computes without already."""
        gone = {} if self._cut else self.gone()
        changed = bool(gone) and self.chosen(epoch)
        check_agreement(self.keep, self.task.ranks)
        watch = self.watch()
        return {
            "churn": watch.churn(self._before),
            "pruned": watch.pruned,
            "revived": 0,
            "dead": sum(int((mask & self._masks[name]).sum()) for name, mask in gone.items()),
            "changed": changed,
        }

    def chosen(self, epoch: int) -> bool:
        """Choose after an epoch, after the last one for good. Returns whether that changed what the
        network computes."""
        raise NotImplementedError

    def after_backward(self) -> None:
        pass

    def still_during(self, epoch: int) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        return {**super().state(), "cut": self._cut}

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self._cut = state["cut"]

    @property
    def zeroed(self) -> nn.Module:
        return self._model if self._cut else self._inserted.network

    # The selection.

    @property
    def rule(self) -> Rule:
        own = replace(self.task.goal.rule, criterion=Rule().criterion, options={}, normalise="none")
        if own.by_hand or own.one_ranking or self.task.goal.latency is not None:
            return own
        return replace(own, scope="global")

    def scored(self, rule: Rule, rate: float) -> dict[str, Tensor]:
        return self.measured()

    def full_rate(self) -> float:
        if self.rate is None:
            self.rate = self._found_rate()
        return self.rate

    def _open(self) -> None:
        if not self._cut and self.task.trained is not self._inserted:
            self.task.train(self._inserted)

    def _places(self, graph: ChannelGraph) -> dict[str, tuple[nn.BatchNorm2d, fx.Node]]:
        """Convolution -> its BatchNorm, and the operation behind which its module goes."""
        places = {}
        key, nodes = f"schedule={self.name}", {name: node for node, name in graph.convolutions()}
        for group in self.task.prunable.groups:
            (name, _), *tied = group.members
            if tied or name not in nodes or name in graph.computed:
                continue
            conv, reader = graph.called(nodes[name]), _only(nodes[name])
            norm = graph.called(reader) if reader is not None else None
            plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.running_mean is not None
            if reader is None or not plain or graph.kinds[reader] != ops.NORM:
                raise Error(
                    f"{key}: no BatchNorm with scale, shift and statistics alone behind {name}; "
                    f"ignore=[{name}] keeps it whole, residual=inner those that write into a "
                    "residual stream; or schedule=gated"
                )
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            place = self.place(reader, graph) if conv.groups == 1 else None
            if place is not None:
                places[name] = norm, place
        if not places:
            raise Error(f"{key}: no convolution of this network fits; schedule=gated, or fade")
        return places


def _only(node: fx.Node) -> fx.Node | None:
    """The one operation that reads a node."""
    return next(iter(node.users)) if len(node.users) == 1 else None
