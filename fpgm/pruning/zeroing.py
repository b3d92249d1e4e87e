"""Filters chosen, zeroed and held: what all schedules of the papers have in common."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fpgm.compaction.constants import analyse
from fpgm.criteria import Criterion
from fpgm.criteria.evidence import Evidence, gather, require
from fpgm.errors import BudgetError, Error
from fpgm.graph.cost import cost
from fpgm.graph.trace import trace
from fpgm.graph.worth import Worth, worths
from fpgm.machine.ranks import check_agreement, from_first
from fpgm.networks.weights import weight_of
from fpgm.pruning.latency import Latency, find
from fpgm.pruning.method import Goal, Schedule, Task
from fpgm.pruning.momentum import remembered
from fpgm.pruning.settling import Settle, Settling, Share
from fpgm.pruning.watch import Watch
from fpgm.selection.budget import LARGEST, rate_nearest, rate_under
from fpgm.selection.ranking import group_scores
from fpgm.selection.rule import Rule
from fpgm.selection.select import all_tied, highest, score
from fpgm.selection.zero import pruned, zero_
from fpgm.shipping.widths import Found, counts

Interval = Annotated[int, Field(ge=1, examples=["1"])]
Recalibrate = Annotated[int, Field(ge=0, examples=["100"])]
Keep = dict[str, Tensor]
Scores = dict[str, Tensor]


class Zeroing(Schedule):
    """Selects after epochs, zeroes what is not kept, and watches it.

    State: keep; scores, layer -> (n,) of the filters that had any when they were last selected;
    rate, the full one, once it is known.
    Schedules say when and how hard (`share_before`, `share_after`, of the full rate) and during
    which epochs pruned filters get no gradient (`masked`).

    interval: epochs between two selections; zero_at_start: whether there is one before the first
    epoch; reset_momentum: whether that of pruned filters is cleared; settle, latest: when the
    selection is fixed and masked for good (see Settling); recalibrate: batches of training images
    on which BatchNorm is estimated again after the last zeroing; train_compact: whether the compact
    network is trained where that takes the same steps.
    """

    cools_down: ClassVar[bool] = False  # whether the last epoch is always one of a fixed selection
    asks_criterion: ClassVar[bool] = True  # whether the run's criterion scores filters (`scored`)

    def __init__(
        self,
        task: Task,
        *,
        interval: Interval = 1,
        zero_at_start: bool = True,
        reset_momentum: bool = True,
        settle: Settle = 1.0,
        latest: Share = 0.6,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        """Raises Error where the network lacks what the criterion looks at."""
        super().__init__(task)
        self.interval, self.zero_at_start = interval, zero_at_start
        end = max(task.epochs - 1, 0) if self.cools_down else None
        self.settling = Settling(settle, latest, task.epochs, end)
        self._reset_momentum, self._recalibrate = reset_momentum, recalibrate
        self._train_compact = train_compact
        self.rate: float | None = None
        self.widths: dict[str, int] = {}  # by layer, where a budget of time has set them
        self.scores: Scores = {}
        self._groups = task.prunable.groups
        self._evidence: Evidence | None = None  # of the weights as they stand, once gathered
        self._worth: list[Worth] | None = None  # what a channel of each group costs
        if task.goal.prunes and self.asks_criterion and self._criterion.views:
            require(self._model, self._criterion.name, task.prunable.layers, task.image)
        self.use(self._everything())

    # What the schedules differ in.

    def scored(self, rule: Rule, rate: float) -> Scores:
        """What filters are chosen by at a rate: layer -> (N,), on the CPU; the lowest go first."""
        if self._evidence is None:
            self._evidence = self._gathered()
        scores = score(self._model, rule, rate, self._groups, self._evidence)
        return {name: values.cpu() for name, values in scores.items()}

    def share_before(self) -> float | None:
        """The share of the full rate at which to prune before the first epoch, None: not at all."""
        # Without epochs there is no later moment.
        now = self.zero_at_start or self.settled(0) or self.task.epochs == 0
        return 1.0 if now else None

    def share_after(self, epoch: int) -> float | None:
        """The share of the full rate at which to select again, None where the selection stays."""
        if self.settled(epoch):
            return None
        # The published code selects after epochs 1, 1 + k, 1 + 2k, ... and the last.
        return 1.0 if epoch % self.interval == 0 or self.last(epoch) else None

    def masked(self, epoch: int) -> bool:
        """Whether pruned filters get no gradient during `epoch`."""
        return self.settled(epoch)

    def settled(self, epoch: int) -> bool:
        """Whether by `epoch` the selection is fixed for good."""
        return self.settling.by(epoch)

    def last(self, epoch: int) -> bool:
        """Whether the selection stays as it is after this epoch."""
        return epoch == self.task.epochs - 1 or self.settled(epoch + 1)

    def still_during(self, epoch: int) -> bool:
        return self._train_compact and self.masked(epoch)

    @property
    def settled_at(self) -> dict[str, Any] | None:
        epoch = self.settling.epoch
        if epoch is None:
            return None
        return {
            "epoch": epoch,
            "at_rest": self.settling.came_to_rest if self.settling.auto else None,
        }

    @property
    def holds(self) -> bool:
        still = self.masked(0) or self.task.epochs == 0
        return self.at_once and self.share_before() is not None and still

    # The moments.

    def start(self) -> None:
        share = self.share_before()
        if share is not None:
            self._refuse_ties(self._choose(share))
            zero_(self._model, self.keep)
            self._clear_momentum()  # of a loop that has taken steps before

    def before_epoch(self, epoch: int) -> None:
        self._masked, self._before = self.masked(epoch), self._masks
        # What is trained may have been exchanged.
        self._watch = Watch(self._model, self._masks, self.task.trained)

    def after_backward(self) -> None:
        self._watch.after_backward(self._masked)

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        """Select again and zero, as the schedule says. Returns what happened, for the history.

        churn: share of the filters pruned now that were not during the epoch; pruned, revived,
        dead: of those that were; changed: whether any weight was, so that the accuracy must be
        measured again. Raises Error where the processes of a run do not agree.
        """
        watch = self._watch
        columns = {"pruned": watch.pruned, "revived": watch.revived(), "dead": watch.dead()}
        churn = 0.0
        share = self.share_after(epoch)
        self.scores, self._evidence = {}, None
        if share is not None:
            self._choose(share)
            churn = self.watch().churn(self._before)
            if share == 1:
                self.settling.see(epoch, self.keep)
        changed = self.enforce(epoch, share is not None)
        check_agreement(self.keep, self.task.ranks)
        if self.settled(epoch + 1) and not self.settled(epoch):
            self._say_settled(epoch + 1)
        return {"churn": churn, **columns, "changed": changed}

    def enforce(self, epoch: int, chosen: bool) -> bool:
        """After an epoch, make the network what the selection says. Returns whether that changed
        what it computes. chosen: whether the selection was made again."""
        # Where nothing has left zero there is nothing to zero and to measure again.
        changed = self.watch().revived() > 0 and (chosen or self._masked)
        if changed:
            zero_(self._model, self.keep)
        if chosen and (self._reset_momentum or self.settled(epoch + 1)):
            self._clear_momentum()
        return changed

    def _say_settled(self, epoch: int) -> None:
        if not self.settling.auto or epoch >= self.task.epochs or not self.task.goal.prunes:
            return
        if self.settling.came_to_rest:
            self.task.say(f"schedule.settle=auto: the selection is at rest after epoch {epoch}")
        else:
            rest = self.settling.rest
            share = "too few to tell" if rest is None else f"{rest:.3f} of what is kept stays"
            self.task.warn(
                f"schedule.settle=auto: the selections still change after epoch {epoch} ({share}), "
                "and are fixed there by schedule.latest"
            )

    def finish(self) -> None:
        """Estimate all BatchNorm statistics again, on training images as they are."""
        if self._recalibrate:
            update_bn((images for images, _ in self.task.batches(self._recalibrate)), self._model)

    def state(self) -> dict[str, Any]:
        found = {"widths": self.widths, "latency": dict(self.latency)}
        chosen = {"keep": self.keep, "rate": self.rate, "scores": self.scores}
        return {**chosen, **found, "settling": self.settling.state()}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.use(state["keep"])
        self.rate, self.scores = state["rate"], dict(state["scores"])
        self.widths, self.latency = dict(state["widths"]), dict(state["latency"])
        self.settling.resume(state["settling"])

    # The selection.

    @property
    def _model(self) -> nn.Module:
        return self.task.full.network

    @property
    def _criterion(self) -> Criterion:
        return self.task.goal.rule.scored_by

    def use(self, keep: Mapping[str, Tensor]) -> None:
        """Take over a selection; nothing is zeroed yet."""
        self.keep = {name: kept.cpu() for name, kept in keep.items()}
        self._masks = pruned(self._model, keep)

    def watch(self) -> Watch:
        """Of the selection as it is, on the network at full width."""
        return Watch(self._model, self._masks, self.task.full)

    def expected(self) -> Keep:
        """What would be kept at the full rate by the weights as they stand. Changes nothing."""
        return self._selected(self.full_rate(), self.rule.align)[0]

    def full_rate(self) -> float:
        """The rate that the run asks for: as given, or found on the compact network's MACs.

        It is found once, for every selection of the run, but where the MACs depend on which
        filters go (the streams' widths, or one ranking over all layers) and these may change.
        """
        depends = self.task.goal.residual == "independent" or self.rule.one_ranking
        if self.rate is None or (self.looks_again() and depends):
            self.rate = self._found_rate()
        return self.rate

    def looks_again(self) -> bool:
        """Whether the rate is to be found anew, as other filters may be selected than last time."""
        return not self.masked(0) or not self.zero_at_start

    def _found_rate(self) -> float:
        goal = replace(self.task.goal, rule=self.rule)
        given = goal.rule.align == 1 or goal.rate == 0 or goal.rule.by_hand
        if goal.macs_target is None and (given or goal.latency is not None):
            return goal.rate
        # On the CPU: the analysis looks at every small result.
        graph = trace(copy.deepcopy(self._model).cpu(), self.task.image)
        dense = cost(graph.module, self.task.image_shape)

        def macs(rate: float, align: int = goal.rule.align) -> int:
            return analyse(graph, self._selected(rate, align)[0]).macs(dense)

        if goal.macs_target is None:
            return rate_nearest(macs(goal.rate, 1), macs)
        return rate_for(goal, dense.macs, macs)

    def _choose(self, share: float) -> Scores:
        """Select that share of what is to go in the end, on the current weights; nothing is zeroed
        yet. Returns all scores."""
        keep, scores = self._selected(self.full_rate(), self.rule.align, share)
        self.use(keep)
        # Filters that were pruned already have none.
        finite = {name: values[values.isfinite()] for name, values in scores.items()}
        self.scores = {name: values for name, values in finite.items() if len(values)}
        return scores

    def _selected(self, rate: float, align: int, share: float = 1.0) -> tuple[Keep, Scores]:
        """The filters to keep at a share of `rate` by the current weights, and the scores that say
        so."""
        rule, groups = replace(self.rule, align=align, share=share), self._groups
        if self.task.goal.latency is not None:
            timed = self._timed_widths(self.task.goal.latency)
            rule = replace(rule, widths=timed, scope="layer")
        if not rule.prunes(rate):
            return self._everything(), {}
        if rule.one_ranking:  # a search for the rate that meets macs_target goes beyond
            rate = min(rate, 1 - rule.floor)
        scores = self.scored(rule, rate)
        if rule.cost != "none" and self._worth is None:
            # On the CPU: the analysis looks at every small result.
            graph = trace(copy.deepcopy(self._model).cpu(), self.task.image)
            self._worth = worths(graph, groups, cost(graph.module, self.task.image_shape))
        chosen = highest(scores, rule, rate, groups, self._worth)
        return self._everything() | chosen, scores

    def _timed_widths(self, latency: Latency) -> dict[str, int]:
        """By layer, found when they are first asked for, by the first rank: others are no slower.
        Raises BudgetError, ShippingError."""
        if self.widths:
            return self.widths
        rule, scores = self.rule, self.scored(self.rule, 0.0)
        found: Found | None = None
        if self.task.ranks.first:
            how = rule.normalise if rule.one_ranking else None
            by_group = [group_scores(group, scores, how) for group in self._groups]
            found = find(
                self._model, self._groups, by_group, latency, rule, self.task.warn, self.silences
            )
        found = from_first(found, self.task.ranks)
        assert found is not None
        self.widths, self.latency = counts(self._groups, found.groups), found.summary()
        return self.widths

    def _everything(self) -> Keep:
        weights = {name: weight_of(self._model, name) for name in self.task.prunable.layers}
        return {name: torch.arange(len(weight)) for name, weight in weights.items()}

    def _gathered(self) -> Evidence:
        """What the criterion looks at beside the weights: the first rank's, so that all agree."""
        if not self._criterion.views:
            return {}
        evidence: Evidence = {}
        if self.task.ranks.first:
            names = [self._criterion.name]
            evidence = gather(
                self._model, names, self.task.shown(), self.task.prunable.layers,
                self.task.image, **self.task.goal.rule.options,
            )  # fmt: skip
        shared: Evidence = from_first(evidence, self.task.ranks)
        return shared

    def _refuse_ties(self, scores: Scores) -> None:
        """A criterion that tells nothing must not choose by index in silence.

        Raises Error where training could help, and warns where it has been done.
        """
        tied = all_tied(scores)
        if not tied or not self._criterion.views:  # of two weights' distances both are the same
            return
        line = f"criterion={self._criterion.name}: all filters of {tied[0]} have one score"
        more = f" (and {len(tied) - 1} more layers)" if tied[1:] else ""
        if self.task.from_scratch:
            raise Error(
                f"{line}{more}, so that there is nothing to choose by before the network is "
                "trained; name a trained one with pretrained=RUN_DIR (pretrained=True in Python)"
            )
        self.task.warn(f"{line}{more}: the lowest indices go first")

    @torch.no_grad()
    def _clear_momentum(self) -> None:
        for name, mask in self._masks.items():
            for value in remembered(self.task.full.optimizer, weight_of(self._model, name)):
                value[mask] = 0


def rate_for(goal: Goal, dense: int, macs: Callable[[float], int]) -> float:
    """The least rate that meets goal.macs_target of the `dense` MACs. Raises BudgetError that names
    the least target which can be met."""
    rule = goal.rule
    try:
        return rate_under((goal.macs_target or 1) * dense, macs)
    except BudgetError as error:
        least = math.ceil(1e3 * macs(LARGEST) / dense) / 1e3
        floor = f" scope={rule.scope} floor={rule.floor}" if rule.one_ranking else ""
        raise BudgetError(
            f"macs_target={goal.macs_target}: not to be reached with residual={goal.residual} "
            f"align={rule.align}{floor}, {error}; the least is macs_target={least}"
        ) from error
