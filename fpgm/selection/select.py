"""Which filters to keep: scores and a rate to `keep`, convolution -> kept filters."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.criteria import CRITERIA, below_live
from fpgm.criteria.evidence import DATA, NEEDS, Evidence, gather, require
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


def kept_count(filters: int, rate: float, align: int = 1) -> int:
    """How many filters stay: filters - floor(filters * rate), or the nearest that is aligned.

    Aligned counts are the multiples of `align`, the smallest no less than align, or all filters.
    """
    if align == 1:
        return filters - pruned_count(filters, rate)
    multiples = {*range(align, filters + 1, align), filters}
    nearest: int = min(sorted(multiples), key=lambda count: abs(count - filters * (1 - rate)))
    return nearest


def select(
    model: nn.Module,
    criterion: str = "gm",
    rate: float = 0.4,
    residual: str = "independent",
    align: int = 1,
    seed: int = 0,
    groups: Iterable[Group] | None = None,
    scope: str = "layer",
    normalise: str = "mean",
    floor: float = 0.1,
    evidence: Evidence | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Choose the filters to keep, group by group; ties go by the lowest index. Changes nothing.

    criterion: a name in CRITERIA, `options` go to its function; residual: see fpgm.graph.groups;
    align: kept counts are multiples of it; seed: for `random`; groups: what may be pruned, by
    default found in the network's graph; scope: `layer`, the same rate for each, or `global`, one
    ranking over the network by scores that are first normalised within each layer (see
    selection.ranking) and that takes no layer below `floor`, a share of its filters, nor below one;
    evidence: what fpgm.evidence.gather has found, for criteria that look at more than the weight.
    Returns convolution -> kept filters, sorted. Raises Error for an unknown criterion or
    mode, a rate outside [0, 1) or that would leave a layer empty, and scores that are no numbers;
    Error where the network lacks what the criterion looks at.
    """
    _check(criterion, residual, rate, scope, normalise, floor)
    groups = list(prunable(trace(model), residual).groups if groups is None else groups)
    scores = score(model, criterion, rate, groups, seed, scope, evidence, **options)
    return highest(scores, rate, groups, align, scope, normalise, floor)


def score(
    model: nn.Module,
    criterion: str,
    rate: float,
    groups: Sequence[Group],
    seed: int = 0,
    scope: str = "layer",
    evidence: Evidence | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The scores that `select` goes by: convolution -> (N,) float64. Arguments as there."""
    if criterion in NEEDS and evidence is None:
        evidence = _own_evidence(model, criterion, groups)
    scores = {
        name: _scores(model, name, criterion, rate, seed, (evidence or {}).get(name, {}), options)
        for name in dict.fromkeys(name for group in groups for name, _ in group.members)
    }
    if scope == "layer":
        return scores
    # Among layers even the geometric median does not put a zeroed filter lowest.
    return {
        name: below_live(own, model.get_submodule(name).weight)  # type: ignore[arg-type]
        for name, own in scores.items()
    }


def highest(
    scores: Mapping[str, Tensor],
    rate: float,
    groups: Sequence[Group],
    align: int = 1,
    scope: str = "layer",
    normalise: str = "mean",
    floor: float = 0.1,
) -> dict[str, Tensor]:
    """The filters to keep by these scores: convolution -> indices, sorted. As `select`."""
    how = normalise if scope == "global" else None
    by_group = [group_scores(group, scores, how) for group in groups]
    if scope == "global":
        counts = kept_in_one_ranking(groups, by_group, rate, align, floor)
    else:
        counts = kept_counts(groups, rate, align)
    keep: dict[str, list[Tensor]] = {}
    for group, own, kept in zip(groups, by_group, counts, strict=True):
        chosen = ascending(own)[len(group) - kept :].cpu()
        for name, filters in group.members:
            keep.setdefault(name, []).append(filters[chosen])
    return {name: torch.cat(parts).sort().values for name, parts in keep.items()}


def _check(
    criterion: str, residual: str, rate: float, scope: str, normalise: str, floor: float
) -> None:
    for key, value, known in (
        ("criterion", criterion, CRITERIA),
        ("residual", residual, RESIDUAL),
        ("scope", scope, SCOPES),
        ("normalise", normalise, NORMALISATIONS),
    ):
        if value not in known:
            raise Error(f"{key}={value}: choose one of {', '.join(known)}")
    if not 0 <= rate < 1:
        raise Error(f"rate={rate}: must be at least 0 and below 1, for example rate=0.4")
    if scope == "layer":
        return
    if not 0 <= floor < 1:
        raise Error(f"floor={floor}: must be at least 0 and below 1, for example 0.1")
    if rate > 1 - floor + 1e-9:
        raise Error(f"rate={rate}: floor={floor} lets at most {1 - floor:.4g} of the filters go")
    if criterion == "mix":
        raise Error(
            "criterion=mix: is an order of pruning within a layer, there is none over a network; "
            "scope=layer, or criterion=gm"
        )


def kept_counts(groups: Sequence[Group], rate: float, align: int = 1) -> list[int]:
    """How many channels of each group stay. Raises Error where a layer would be empty.

    It is the layer that is to have `kept_count` filters, and a layer may be made of several groups
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
        target = kept_count(sizes[layer], rate, align)
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


def _scores(
    model: nn.Module,
    name: str,
    criterion: str,
    rate: float,
    seed: int,
    evidence: Mapping[str, Tensor],
    options: dict[str, Any],
) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    extra: dict[str, Any] = {}
    if criterion == "mix":
        extra["pruned"] = pruned_count(len(weight), rate)
    elif criterion == "random":  # layers of one size must not lose the same filters
        extra["seed"] = zlib.crc32(f"{seed}/{name}".encode())
    elif criterion in NEEDS:
        key = NEEDS[criterion]
        if key not in evidence:
            raise Error(f"criterion={criterion}: the evidence has no {key} of {name}")
        extra[key] = evidence[key]
    scores = CRITERIA[criterion](weight, **options, **extra)
    # -inf is a score, that of a filter that is pruned already (see fpgm.criteria).
    if not weight.isfinite().all() or not (scores < torch.inf).all():
        raise Error(
            f"{name}: its weights, or the scores that criterion={criterion} gives them, are not "
            "finite (NaN or too large); start from other weights"
        )
    return scores


def _own_evidence(model: nn.Module, criterion: str, groups: Iterable[Group]) -> Evidence:
    """What the network itself shows, without data. Raises Error, Error."""
    layers = list(dict.fromkeys(name for group in groups for name, _ in group.members))
    require(model, criterion, layers)
    if criterion in DATA:
        raise Error(
            f"criterion={criterion}: looks at images, give "
            f"evidence=fpgm.evidence.gather(model, [{criterion!r}], batches)"
        )
    return gather(model, [criterion], layers=layers)


def pruned(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The complement of `keep`: convolution -> (N,) mask, True where a filter is pruned."""
    modules = dict(model.named_modules())
    masks = {}
    for name, kept in keep.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise Error(f"keep[{name!r}]: no such layer with a weight")
        if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < len(weight):
            raise Error(f"keep[{name!r}] has indices outside 0..{len(weight) - 1}")
        mask = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        masks[name] = mask.index_fill_(0, kept.to(weight.device), False)
    return masks


@torch.no_grad()
def zero_(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Set the weights of all filters outside `keep` to zero, in place. Biases stay as they are."""
    for name, mask in pruned(model, keep).items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight[mask] = 0
