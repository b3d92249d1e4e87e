"""The pruned filters of a network in training: chosen, zeroed, held still, and watched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.compaction.compact import compact
from fpgm.config import Config
from fpgm.criteria.evidence import NEEDS, Batches, Evidence, gather, require
from fpgm.errors import BudgetError
from fpgm.graph.cost import cost
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.machine.ranks import ALONE, Ranks, from_first
from fpgm.methods import schedules
from fpgm.methods.compacted import Compacted
from fpgm.selection.budget import LARGEST, rate_nearest, rate_under
from fpgm.selection.select import highest, pruned, score, zero_


class Pruning:
    """State: `keep`, convolution -> kept filters, and which pruned filters have seen a gradient."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        image: tuple[int, int, int],
        batches: Callable[[], Batches] = tuple,
        ranks: Ranks = ALONE,
    ) -> None:
        """image: (C, H, W); batches: those that a criterion which looks at data is shown at each
        selection. Raises Error where the network lacks what the criterion looks at."""
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.image = image
        self.prunable = prunable(trace(model), config.residual)
        self.rate: float | None = None  # the full rate, once it is known
        self.scores: dict[str, Tensor] = {}  # layer -> (N,) of the last selection
        self._batches, self._ranks = batches, ranks
        self._evidence: Evidence | None = None  # of the weights as they stand, once it is gathered
        if config.criterion.name in NEEDS and (config.rate or config.macs_target):
            require(model, config.criterion.name, self.prunable.layers)
        self._compacted: Compacted | None = None  # what is trained in place of `model`
        self.choose(0.0)

    def choose(self, rate: float) -> None:
        """Select at `rate` on the current weights; nothing is zeroed yet."""
        self.use(self.selection(rate, self.config.align if rate else 1))

    def selection(self, rate: float, align: int) -> dict[str, Tensor]:
        """The filters to keep at `rate` by the current weights."""
        c = self.config
        if rate == 0:
            filters = {n: self.model.get_submodule(n).weight for n in self.prunable.layers}
            return {name: torch.arange(len(own)) for name, own in filters.items()}  # type: ignore[arg-type]
        if self._evidence is None:
            self._evidence = self._gathered()
        if c.scope == "global":  # a search for the rate that meets macs_target goes beyond
            rate = min(rate, 1 - c.floor)
        groups, own = self.prunable.groups, c.criterion
        scores = score(
            self.model, own.name, rate, groups, c.seed, c.scope, self._evidence, **own.options()
        )
        self.scores = {name: values.cpu() for name, values in scores.items()}
        return highest(self.scores, rate, groups, align, c.scope, c.scope_norm, c.floor)

    def _gathered(self) -> Evidence:
        """What the criterion looks at beside the weights: the first rank's, so that all agree."""
        name, layers = self.config.criterion.name, self.prunable.layers
        own: Evidence = {}
        if name in NEEDS and self._ranks.first:
            own = gather(self.model, [name], self._batches(), layers)
        shared: Evidence = from_first(own, self._ranks) if name in NEEDS else own
        return shared

    def finite_scores(self) -> dict[str, Tensor]:
        """Of the selection after the last epoch, if there was one: layer -> scores of its filters,
        but of those that were pruned already and have none."""
        finite = {name: own[own.isfinite()].cpu() for name, own in self.scores.items()}
        return {name: own for name, own in finite.items() if len(own)}

    def full_rate(self) -> float:
        """The rate that the run asks for: as given, or found on the compact network's MACs.

        A rate is found once, for every selection of the run, but where the MACs depend on which
        filters go (the streams' widths, or one ranking over all layers) and these may change.
        """
        c = self.config
        moving = c.schedule.name in ("soft", "asymptotic") or not c.schedule.zero_at_start
        if self.rate is None or (moving and (c.residual == "independent" or c.scope == "global")):
            self.rate = self._found_rate()
        return self.rate

    def _found_rate(self) -> float:
        c = self.config
        if c.macs_target is None and (c.align == 1 or c.rate == 0):
            return c.rate
        model = copy.deepcopy(self.model).cpu()  # compaction waits for every small result

        def macs(rate: float, align: int = c.align) -> int:
            return cost(compact(model, self.selection(rate, align)), self.image).macs

        if c.macs_target is None:
            return rate_nearest(macs(c.rate, 1), macs)
        dense = cost(model, self.image).macs
        try:
            return rate_under(c.macs_target * dense, macs)
        except BudgetError as error:
            least = math.ceil(1e3 * macs(LARGEST) / dense) / 1e3
            floor = f" scope=global floor={c.floor}" if c.scope == "global" else ""
            raise BudgetError(
                f"macs_target={c.macs_target}: not to be reached with residual={c.residual} "
                f"align={c.align}{floor}, {error}; the least is macs_target={least}"
            ) from error

    def use(self, keep: Mapping[str, Tensor]) -> None:
        """Take over a selection."""
        self.keep = {name: kept.cpu() for name, kept in keep.items()}
        self._weights: dict[str, Tensor] = {}
        for name in keep:
            weight = self.model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            self._weights[name] = weight
        self._masks = pruned(self.model, keep)
        self.watch(self._compacted)

    def watch(self, compacted: Compacted | None) -> None:
        """Say which network is trained: the compact one, or None for the one at full width."""
        self._compacted = compacted
        network = self.model if compacted is None else compacted.network
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
        self._scales = [norm.weight for norm in norms]
        # Of the layers that have pruned filters, in lists for torch's foreach operations.
        self._watched: list[Tensor] = []  # the weights that are trained
        self._kept: list[Tensor] = []  # 0 where a filter is pruned, else 1
        self._seen: list[Tensor] = []  # gradients so far, their absolute values summed
        for name, mask in self._masks.items():
            weight = network.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            own = mask if compacted is None else mask[compacted.rows(name)]
            if own.any():
                self._watched.append(weight)
                self._kept.append(torch.ones_like(weight).masked_fill_(own.view(-1, 1, 1, 1), 0))
                self._seen.append(torch.zeros_like(weight))

    @property
    def count(self) -> int:
        """How many filters are pruned."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    def start(self) -> None:
        """Before the first epoch."""
        rate = schedules.rate_before(self.config.schedule, self.full_rate())
        if rate is not None:
            self.choose(rate)
            zero_(self.model, self.keep)

    def start_epoch(self) -> None:
        """Forget which pruned filters have seen a gradient."""
        for seen in self._seen:
            seen.zero_()

    @torch.no_grad()
    def after_backward(self, masked: bool) -> None:
        """Note which pruned filters a gradient reaches and, if `masked`, take it from them.

        Network Slimming's penalty is added to the gradients of BatchNorm's scales, where asked for.
        """
        if self.config.criterion.slimming:
            for scale in self._scales:
                assert scale.grad is not None
                scale.grad.add_(scale.sign(), alpha=self.config.criterion.slimming)
        gradients = [weight.grad for weight in self._watched if weight.grad is not None]
        assert len(gradients) == len(self._watched)
        # A few launches for all layers: one by one they take a GPU as long as a forward pass.
        if gradients:
            torch._foreach_add_(self._seen, torch._foreach_abs(gradients))
            if masked:
                torch._foreach_mul_(gradients, self._kept)

    @torch.no_grad()
    def revived(self) -> int:
        """Pruned filters whose weight has left zero."""
        moved = (self._weights[n].flatten(1).any(1) & mask for n, mask in self._masks.items())
        return sum(int(m.sum()) for m in moved)

    def dead(self) -> int:
        """Pruned filters that no gradient reached since `start_epoch`."""
        reached = (
            seen.flatten(1).any(1) & ~kept.flatten(1).any(1)
            for seen, kept in zip(self._seen, self._kept, strict=True)
        )
        return self.count - sum(int(filters.sum()) for filters in reached)

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        """Select again and zero, as the schedule says. Returns what happened, for the history.

        pruned, revived, dead: of the filters that were pruned during the epoch; churn: share of
        those pruned now that were not then; changed: whether any weight was, so that the accuracy
        must be measured again.
        """
        schedule, epochs = self.config.schedule, self.config.epochs
        held = {"pruned": self.count, "revived": self.revived(), "dead": self.dead()}
        churn = 0.0
        old = self._masks
        rate = schedules.rate_after(schedule, epoch, epochs, 1.0)  # a share of the full rate
        self.scores = {}
        if rate is not None:
            self._evidence = None
            self.choose(rate * self.full_rate())
            new = sum(int((mask & ~old[name]).sum()) for name, mask in self._masks.items())
            churn = new / self.count if self.count else 0.0
        changed = self.revived() > 0
        if changed and (rate is not None or schedules.masked(schedule, epoch, epochs)):
            zero_(self.model, self.keep)
        else:
            changed = False
        settling = schedules.settled(schedule, epoch + 1, epochs)
        if rate is not None and (schedule.reset_momentum or settling):
            self._clear_momentum()
        return {"churn": churn, **held, "changed": changed}

    @torch.no_grad()
    def _clear_momentum(self) -> None:
        for name, mask in self._masks.items():
            buffer = self.optimizer.state[self._weights[name]].get("momentum_buffer")
            if buffer is not None:
                buffer[mask] = 0
