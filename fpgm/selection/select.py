"""Which filters to keep: scores and a rate to `keep`, convolution -> kept filters."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.criteria import Criterion, named
from fpgm.criteria.criterion import below_live
from fpgm.criteria.evidence import Evidence, gather, require
from fpgm.errors import Error
from fpgm.graph.groups import RESIDUAL, Group, prunable
from fpgm.graph.trace import trace
from fpgm.selection.ranking import (
    NORMALISATIONS,
    ascending,
    group_scores,
    kept_in_one_ranking,
    pruned_count,
)

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Rule:
    """How filters are chosen.

    criterion, options: a name that criteria.named takes, and what its function is given; scope:
    `layer`, the same rate for each, or `global`, one ranking over the network by scores normalised
    within each layer as `normalise` says (see selection.ranking) that takes no layer below `floor`,
    a share of its filters, nor below one; align: kept counts are multiples of it; seed: of chance.
    Raises Error for what does not exist or does not go together.
    """

    criterion: str = "gm"
    options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "layer"
    normalise: str = "mean"
    floor: float = 0.1
    align: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise Error("\n".join(problems))

    def problems(self) -> list[str]:
        """A line for each thing that is wrong."""
        problems = [
            f"{key}={value}: choose one of {', '.join(choices)}"
            for key, value, choices in (
                ("scope", self.scope, SCOPES),
                ("normalise", self.normalise, NORMALISATIONS),
            )
            if value not in choices
        ]
        if self.scope == "global" and not 0 <= self.floor < 1:
            problems.append(f"floor={self.floor}: must be at least 0 and below 1, for example 0.1")
        try:
            criterion = named(self.criterion)
        except Error as error:
            return [*problems, str(error)]
        if self.scope == "global" and criterion.places:
            problems.append(
                f"scope=global: criterion={self.criterion} is an order of pruning within a layer "
                "and has no scores to compare layers by; criterion=gm, or scope=layer"
            )
        return problems + criterion.check(self.options)

    @property
    def scored_by(self) -> Criterion:
        return named(self.criterion)

    def pruned(self, filters: int, rate: float) -> int:
        """How many of a layer's filters go at `rate`."""
        count = self.scored_by.pruned
        return count(filters, rate, **self.options) if count else pruned_count(filters, rate)

    def kept(self, filters: int, rate: float) -> int:
        """How many filters stay: all but those that go, or the nearest number that is aligned.

        Aligned counts are the multiples of `align`, the smallest no less than align, or all.
        """
        if self.align == 1:
            return filters - self.pruned(filters, rate)
        multiples = {*range(self.align, filters + 1, self.align), filters}
        nearest: int = min(sorted(multiples), key=lambda count: abs(count - filters * (1 - rate)))
        return nearest


def select(
    model: nn.Module,
    criterion: str = "gm",
    rate: float = 0.4,
    residual: str = "independent",
    align: int = 1,
    seed: int = 0,
    scope: str = "layer",
    normalise: str = "mean",
    floor: float = 0.1,
    evidence: Evidence | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Choose the filters to keep, group by group; ties go by the lowest index. Changes nothing.

    criterion: a name in CRITERIA, `options` go to its function; residual: see graph.groups;
    evidence: what fpgm.evidence.gather returns, for criteria that look at images; the others: see
    Rule. Returns convolution -> kept filters, sorted.
    Raises Error for what does not exist, a rate outside [0, 1) or that would leave a layer empty,
    scores that are no numbers, and a network that lacks what the criterion looks at.
    """
    if residual not in RESIDUAL:
        raise Error(f"residual={residual}: choose one of {', '.join(RESIDUAL)}")
    rule = Rule(criterion, options, scope, normalise, floor, align, seed)
    groups = prunable(trace(model), residual).groups
    return highest(score(model, rule, rate, groups, evidence), rule, rate, groups)


def score(
    model: nn.Module,
    rule: Rule,
    rate: float,
    groups: Sequence[Group],
    evidence: Evidence | None = None,
) -> dict[str, Tensor]:
    """The scores that `select` goes by: convolution -> (N,) float64. Raises Error."""
    criterion = rule.scored_by
    layers = list(dict.fromkeys(name for group in groups for name, _ in group.members))
    if criterion.views and evidence is None:
        evidence = _without_images(model, criterion, layers)
    scores = {
        name: _scores(model, name, criterion, rule, rate, (evidence or {}).get(name, {}))
        for name in layers
    }
    if rule.scope == "layer":
        return scores
    # Among layers even the geometric median does not put a zeroed filter lowest.
    return {
        name: below_live(values, model.get_submodule(name).weight)  # type: ignore[arg-type]
        for name, values in scores.items()
    }


def highest(
    scores: Mapping[str, Tensor], rule: Rule, rate: float, groups: Sequence[Group]
) -> dict[str, Tensor]:
    """The filters to keep by these scores: convolution -> indices, sorted. Raises Error."""
    if not 0 <= rate < 1:
        raise Error(f"rate={rate}: must be at least 0 and below 1, for example rate=0.4")
    one_ranking = rule.scope == "global"
    if one_ranking and rate > 1 - rule.floor + 1e-9:
        raise Error(
            f"rate={rate}: floor={rule.floor} lets at most {1 - rule.floor:.4g} of the filters go"
        )
    by_group = [group_scores(g, scores, rule.normalise if one_ranking else None) for g in groups]
    if one_ranking:
        counts = kept_in_one_ranking(groups, by_group, rate, rule.align, rule.floor)
    else:
        counts = kept_counts(groups, rule, rate)
    keep: dict[str, list[Tensor]] = {}
    for group, values, kept in zip(groups, by_group, counts, strict=True):
        chosen = ascending(values)[len(group) - kept :].cpu()
        for name, filters in group.members:
            keep.setdefault(name, []).append(filters[chosen])
    return {name: torch.cat(parts).sort().values for name, parts in keep.items()}


def kept_counts(groups: Sequence[Group], rule: Rule, rate: float) -> list[int]:
    """How many channels of each group stay. Raises Error where a layer would be empty.

    It is the layer that is to keep `rule.kept` filters, and a layer may be made of several groups
    (of a stream that grows by shortcuts A, the channels that were there before and the new ones).
    Each group follows its narrowest layer, and gets its share of what that one has still to keep.
    """
    sizes: Counter[str] = Counter()
    for group in groups:
        sizes.update({name: len(group) for name, _ in group.members})
    undecided, decided = Counter(sizes), Counter[str]()
    counts = []
    for group in groups:
        layer = min((name for name, _ in group.members), key=lambda name: sizes[name])
        target = rule.kept(sizes[layer], rate)
        if target == 0:
            raise Error(
                f"rate={rate}: would prune all {sizes[layer]} filters of {layer}; at most "
                f"{(sizes[layer] - 1) / sizes[layer]:.4g} leaves it one"
            )
        share = (target - decided[layer]) * len(group) / undecided[layer]
        kept = min(max(round(share), 0), len(group))
        for name, _ in group.members:
            undecided[name] -= len(group)
            decided[name] += kept
        counts.append(kept)
    return counts


def all_tied(scores: Mapping[str, Tensor]) -> list[str]:
    """The layers that a criterion tells nothing about: all their filters, and there are several,
    have one score."""
    return [
        name
        for name, values in scores.items()
        if len(values) > 1 and bool((values == values[0]).all())
    ]


def _scores(
    model: nn.Module,
    name: str,
    criterion: Criterion,
    rule: Rule,
    rate: float,
    evidence: Mapping[str, Tensor],
) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    lacking = next((parameter for parameter in criterion.views if parameter not in evidence), None)
    if lacking is not None:
        raise Error(f"criterion={rule.criterion}: the evidence has no {lacking} of {name}")
    looked_at = {parameter: evidence[parameter] for parameter in criterion.views}
    # Layers of one size must not lose the same filters by chance.
    offered = {"rate": rate, "seed": zlib.crc32(f"{rule.seed}/{name}".encode())}
    given = {key: offered[key] for key in criterion.given}
    scores = criterion(weight, **looked_at, **given, **rule.options)
    # -inf is a score, that of a filter that is pruned already (see fpgm.criteria).
    if not weight.isfinite().all() or not (scores < torch.inf).all():
        raise Error(
            f"{name}: its weights, or the scores that criterion={rule.criterion} gives them, are "
            "not finite (NaN or too large); start from other weights"
        )
    return scores


def _without_images(model: nn.Module, criterion: Criterion, layers: Iterable[str]) -> Evidence:
    """What the network itself shows, without data. Raises Error."""
    layers = list(layers)
    require(model, criterion.name, layers)
    if criterion.reads_images:
        raise Error(
            f"criterion={criterion.name}: looks at images, give "
            f"evidence=fpgm.evidence.gather(model, [{criterion.name!r}], batches)"
        )
    return gather(model, [criterion.name], layers=layers)
