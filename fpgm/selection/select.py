"""Which filters to keep: scores and a rate to `keep`, convolution -> kept filters."""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.criteria import Criterion
from fpgm.criteria.criterion import below_live
from fpgm.criteria.evidence import Evidence, gather, require
from fpgm.errors import Error
from fpgm.graph.cost import cost as cost_of
from fpgm.graph.groups import RESIDUAL, Group, prunable
from fpgm.graph.trace import trace
from fpgm.graph.worth import Worth, worths
from fpgm.networks.weights import weight_of
from fpgm.selection.ranking import (
    best,
    group_scores,
    kept_above,
    kept_in_one_ranking,
)
from fpgm.selection.rule import Rule


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
    *,
    rates: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    widths: Mapping[str, int] | Sequence[int] | None = None,
    rounding: str = "pruned",
    threshold: float | None = None,
    cost: str = "none",
    image: tuple[int, int, int] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Choose the filters to keep, group by group; ties go by the lowest index. Changes nothing.

    criterion: a name in CRITERIA, `options` go to its function; residual: see graph.groups;
    evidence: what fpgm.evidence.gather returns, for criteria that look at images; rates, widths:
    by layer, in place of `rate` (patterns on names; widths as a list: one for each layer that may
    be pruned, in order of execution); ignore: patterns of layers that stay whole; image: (C, H, W),
    to count what a channel costs, and where the way through the network's code depends on it; the
    others: see Rule.
    Returns convolution -> kept filters, sorted.
    Raises Error for what does not exist, a rate outside [0, 1) or that would leave a layer empty,
    a pattern that fits no layer, scores that are no numbers, and a network that lacks what the
    criterion looks at.
    """
    if residual not in RESIDUAL:
        raise Error(f"residual={residual}: choose one of {', '.join(RESIDUAL)}")
    rule = Rule(
        criterion, options, scope, normalise, floor, align, seed, cost,
        rates or {}, widths or {}, rounding, threshold,
    )  # fmt: skip
    if cost != "none" and image is None:
        raise Error(f"cost={cost}: depends on the images' size, give image=(C, H, W)")
    graph = trace(model, image)
    tied = prunable(graph, residual, ignore)
    rule = rule.for_network({name: graph.filters(name) for name in tied.layers}, tied.kept_full)
    worth = worths(graph, tied.groups, cost_of(model, image)) if image is not None else None
    scores = score(model, rule, rate, tied.groups, evidence, image)
    return highest(scores, rule, rate, tied.groups, worth)


def score(
    model: nn.Module,
    rule: Rule,
    rate: float,
    groups: Sequence[Group],
    evidence: Evidence | None = None,
    image: tuple[int, int, int] | None = None,
) -> dict[str, Tensor]:
    """The scores that `select` goes by: convolution -> (N,) float64. Raises Error."""
    criterion = rule.scored_by
    layers = list(dict.fromkeys(name for group in groups for name, _ in group.members))
    if criterion.views and evidence is None:
        evidence = _without_images(model, rule, layers, image)
    if criterion.joint and evidence is not None:
        evidence = _together(evidence, criterion, groups)
    scores = {
        name: _scores(model, name, criterion, rule, rate, (evidence or {}).get(name, {}))
        for name in layers
    }
    if not rule.one_ranking and rule.threshold is None:
        return scores
    # Among layers, or beside a number, even the geometric median does not put a zeroed filter
    # lowest.
    return {name: below_live(values, weight_of(model, name)) for name, values in scores.items()}


def highest(
    scores: Mapping[str, Tensor],
    rule: Rule,
    rate: float,
    groups: Sequence[Group],
    worth: Sequence[Worth] | None = None,
) -> dict[str, Tensor]:
    """The filters to keep by these scores: convolution -> indices, sorted. Raises Error.

    worth: what a channel of each group costs, where the rule divides by it.
    """
    if not 0 <= rate < 1:
        raise Error(f"rate={rate}: must be at least 0 and below 1, for example rate=0.4")
    if rule.one_ranking and rule.share * rate > 1 - rule.floor + 1e-9:
        raise Error(
            f"rate={rate}: floor={rule.floor} lets at most {1 - rule.floor:.4g} of the filters go"
        )
    how = rule.normalise if rule.one_ranking else None if rule.threshold is None else "none"
    by_group = [group_scores(g, scores, how) for g in groups]
    if rule.cost != "none":
        assert worth is not None
        costs = [getattr(channel, rule.cost) for channel in worth]
        by_group = [s / c if c else s for s, c in zip(by_group, costs, strict=True)]
    if rule.threshold is not None:
        steps = [math.lcm(rule.align, group.blocks) for group in groups]
        counts = [
            kept_above(s, rule.threshold, step, rule.share)
            for s, step in zip(by_group, steps, strict=True)
        ]
    elif rule.one_ranking:
        counts = _counts_by_ranking(groups, by_group, rule, rule.share * rate)
    else:
        counts = kept_counts(groups, rule, rate)
    keep: dict[str, list[Tensor]] = {}
    for group, values, kept in zip(groups, by_group, counts, strict=True):
        chosen = best(values, kept, group.blocks).cpu()
        for name, filters in group.members:
            keep.setdefault(name, []).append(filters[chosen])
    return {name: torch.cat(parts).sort().values for name, parts in keep.items()}


def _counts_by_ranking(
    groups: Sequence[Group], scores: Sequence[Tensor], rule: Rule, rate: float
) -> list[int]:
    """How many channels of each group stay by one ranking over all, or over those that are alike
    (the isomorphic groups of Torch-Pruning)."""
    sets: defaultdict[object, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        sets[group.shape if rule.scope == "isomorphic" else None].append(index)
    counts = [0] * len(groups)
    for places in sets.values():
        ranked = kept_in_one_ranking(
            [groups[i] for i in places], [scores[i] for i in places], rate, rule.align, rule.floor
        )
        for place, kept in zip(places, ranked, strict=True):
            counts[place] = kept
    return counts


def kept_counts(groups: Sequence[Group], rule: Rule, rate: float) -> list[int]:
    """How many channels of each group stay. Raises Error where a layer would be empty, or cannot
    have what is asked for it by name.

    It is the layer that is to keep `rule.kept_of` filters, and a layer may be made of several
    groups (of a stream that grows by shortcuts A, the channels that were there before and the new
    ones). Each group follows its narrowest layer, and gets its share of what that one has still to
    keep; of layers as narrow, one that is asked for by name, then the one that keeps most.
    """
    sizes: Counter[str] = Counter()
    for group in groups:
        sizes += group.filters
    targets = {name: rule.kept_of(name, sizes[name], rate) for name in sizes}
    named = {name for name in sizes if name in rule.rates or name in rule.widths}
    undecided, decided = Counter(sizes), Counter[str]()
    counts: list[int] = []
    deciding: dict[str, str] = {}
    steps: dict[str, int] = {}
    for group in groups:
        layer = min(
            group.filters, key=lambda name: (sizes[name], name not in named, -targets[name])
        )
        target = targets[layer]
        if target == 0:
            asked = rule.rates.get(layer, rate)
            raise Error(
                f"rate={asked}: would prune all {sizes[layer]} filters of {layer}; at most "
                f"{(sizes[layer] - 1) / sizes[layer]:.4g} leaves it one"
            )
        share = (target - decided[layer]) * len(group) / undecided[layer]
        kept = min(max(round(share), 0), len(group))
        if group.blocks > 1:
            kept = max(round(share / group.blocks), 1) * group.blocks
        for name, filters in group.filters.items():
            undecided[name] -= filters
            decided[name] += filters // len(group) * kept
            deciding[name], steps[name] = layer, max(rule.align, group.blocks)
        counts.append(kept)
    for name in named:
        if abs(decided[name] - targets[name]) >= steps[name]:
            key = "widths" if name in rule.widths else "rates"
            raise Error(
                f"{key}: {name} is to keep {targets[name]} of {sizes[name]} filters and would keep "
                f"{decided[name]}, as it is decided together with {deciding[name]}: ask the same "
                "of both, or residual=independent"
            )
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
    weight = weight_of(model, name)
    lacking = next((parameter for parameter in criterion.views if parameter not in evidence), None)
    if lacking is not None:
        raise Error(f"criterion={rule.criterion}: the evidence has no {lacking} of {name}")
    looked_at = {parameter: evidence[parameter] for parameter in criterion.views}
    # Layers of one size must not lose the same filters by chance.
    share = rule.rate_of(name, rate, len(weight))
    offered = {"rate": share, "seed": zlib.crc32(f"{rule.seed}/{name}".encode())}
    given = {key: offered[key] for key in criterion.given}
    # A linear layer is a convolution of one pixel.
    filters = weight if weight.dim() == 4 else weight[:, :, None, None]
    scores = criterion(filters, **looked_at, **given, **rule.options)
    # -inf is a score, that of a filter that is pruned already (see fpgm.criteria).
    if not weight.isfinite().all() or not (scores < torch.inf).all():
        raise Error(
            f"{name}: its weights, or the scores that criterion={rule.criterion} gives them, are "
            "not finite (NaN or too large); start from other weights"
        )
    return scores


def _together(evidence: Evidence, criterion: Criterion, groups: Sequence[Group]) -> Evidence:
    """What is seen of the filters that write one channel, added up, as that of each of them."""
    summed = {
        layer: {p: values[p].clone() for p in criterion.views if p in values}
        for layer, values in evidence.items()
    }
    for group in groups:
        for parameter in criterion.views:
            total = torch.stack([evidence[n][parameter][own] for n, own in group.members]).sum(0)
            for name, own in group.members:
                summed[name][parameter][own] = total
    return summed


def _without_images(
    model: nn.Module,
    rule: Rule,
    layers: Iterable[str],
    image: tuple[int, int, int] | None,
) -> Evidence:
    """What the network itself shows, without data. Raises Error."""
    layers, criterion = list(layers), rule.scored_by
    require(model, criterion.name, layers, image)
    if criterion.reads_images:
        raise Error(
            f"criterion={criterion.name}: looks at images, give "
            f"evidence=fpgm.evidence.gather(model, [{criterion.name!r}], batches)"
        )
    return gather(model, [criterion.name], layers=layers, image=image, **rule.options)
