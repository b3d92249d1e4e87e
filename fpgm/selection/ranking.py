"""Scores put in order: ties, layers of different scale, and one ranking over a whole network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fpgm.graph.groups import Group

NORMALISATIONS = ("none", "mean", "l2", "rank")


def normalised(scores: Tensor, how: str = "mean") -> Tensor:
    """The scores of one layer made comparable with those of others. (N,) -> (N,).

    none  as they are
    mean  over the mean of their absolute values: the layers' typical filters are worth the same
    l2    over their Euclidean norm (Molchanov et al., ICLR 2017): wide layers lose more
    rank  their place in the layer, over N: every layer loses the same share

    Filters that are pruned already (-inf) count for no scale and stay where they are. Raises
    ValueError for another word.
    """
    if how not in NORMALISATIONS:
        raise ValueError(f"normalise={how}: choose one of {', '.join(NORMALISATIONS)}")
    live = scores[scores.isfinite()]
    if how == "rank":
        order = ascending(scores)
        places = torch.arange(1, len(order) + 1, dtype=scores.dtype, device=scores.device)
        ranks = torch.empty_like(scores).scatter_(0, order, places / len(order))
        return ranks.masked_fill(~scores.isfinite(), -torch.inf)
    if how == "none" or not live.any():
        return scores
    return scores / (live.abs().mean() if how == "mean" else live.norm())


def group_scores(group: Group, scores: Mapping[str, Tensor], how: str | None = None) -> Tensor:
    """One score for each channel of a group, (n,).

    how: a normalisation of each layer's scores, over the whole layer; None: none where one layer
    alone writes the channels, and `mean` where several do, as layers differ in scale. Of several
    the mean is taken, of those that have not pruned the channel already.
    """
    if how is None:
        how = "none" if len(group.members) == 1 else "mean"
    parts = torch.stack([normalised(scores[name], how)[own] for name, own in group.members])
    live = parts > -torch.inf
    means = parts.masked_fill(~live, 0).sum(0) / live.sum(0)
    return means.masked_fill(~live.any(0), -torch.inf)


def levelled(scores: Tensor) -> Tensor:
    """The same with scores made equal that are so to 11 digits of the largest. (n,) -> (n,).

    Equal filters get scores that differ in the last bits by the order of summation.
    """
    largest = scores[scores.isfinite()].abs().max() if scores.isfinite().any() else torch.zeros(())
    return (scores / largest * 1e11).round() * (largest / 1e11) if largest > 0 else scores


def ascending(scores: Tensor) -> Tensor:
    """Indices, lowest score first; ties go by the lowest index. (n,) -> (n,)."""
    return torch.argsort(levelled(scores), stable=True)


def best(scores: Tensor, kept: int, blocks: int = 1) -> Tensor:
    """The indices of the `kept` highest of (n,), the same number from each of `blocks` runs."""
    size, each = len(scores) // blocks, kept // blocks
    runs = scores.view(blocks, size)
    chosen = [ascending(run)[size - each :] + start * size for start, run in enumerate(runs)]
    return torch.cat(chosen)


def pruned_count(filters: int, rate: float) -> int:
    """How many of so many filters go: floor(filters * rate), safe against rounding from below."""
    return int(filters * rate + 1e-9)


def least_kept(filters: int, floor: float) -> int:
    """How many of `filters` stay whatever their scores: the share `floor`, and one."""
    return max(1, math.ceil(filters * floor - 1e-9))


def kept_above(scores: Tensor, threshold: float, align: int, share: float = 1.0) -> int:
    """How many channels stay where all with a score below `threshold` go: one at least, in
    multiples of `align` as many as hold those, or all. (n,).

    share: how much of what is to go goes by now.
    """
    filters = len(scores)
    kept = filters - pruned_count(int((scores < threshold).sum()), share)
    return min(-(-max(kept, 1) // align) * align, filters)


def kept_in_one_ranking(
    groups: Sequence[Group], scores: Sequence[Tensor], rate: float, align: int, floor: float
) -> list[int]:
    """How many channels of each group stay when the lowest of the whole network go.

    scores: (n,) for each group, comparable with each other. Of all filters at most
    `pruned_count` go, and from each group only down to `floor`, in steps that leave multiples
    of `align` (of each group); a step is as low as the mean of its channels. A step that would
    exceed the count is left out with all above it in its group. So, once the filters chosen are
    zero and score lowest, the same are chosen again.
    """
    limit = pruned_count(sum(len(group) * len(group.members) for group in groups), rate)
    steps: list[tuple[float, int, int]] = []
    for index, own in enumerate(scores):
        lowest = levelled(own).sort().values.tolist()
        gone, score = 0, -math.inf
        for kept in _smaller(len(own), math.lcm(align, groups[index].blocks), floor):
            step = lowest[gone : len(own) - kept]
            # Never below the step before, which rounding of a mean of equals could do.
            score = max(sum(step) / len(step), score)
            steps.append((score, index, kept))
            gone = len(own) - kept
    counts = [len(group) for group in groups]
    pruned, closed = 0, set()
    for _, index, kept in sorted(steps, key=lambda step: step[:2]):
        cost = (counts[index] - kept) * len(groups[index].members)
        if index in closed or pruned + cost > limit:
            closed.add(index)
            continue
        counts[index] = kept
        pruned += cost
    return counts


def _smaller(filters: int, align: int, floor: float) -> Iterator[int]:
    """The numbers of channels that a group may keep, but all of them, from the largest down."""
    least = max(least_kept(filters, floor), align)
    for kept in range((filters - 1) // align * align, 0, -align):
        if kept >= least:
            yield kept


def at_floor(
    groups: Sequence[Group], kept: Mapping[str, int], align: int, floor: float
) -> list[str]:
    """The layers that have lost all that one ranking lets them lose: those that collapse.

    kept: layer -> filters that stay.
    """
    least: dict[str, int] = {}
    full: dict[str, int] = {}
    for group in groups:
        step = math.lcm(align, group.blocks)
        fewest = min(_smaller(len(group), step, floor), default=len(group))
        for name, filters in group.filters.items():
            least[name] = least.get(name, 0) + filters // len(group) * fewest
            full[name] = full.get(name, 0) + filters
    return [name for name in least if kept[name] <= least[name] < full[name]]
