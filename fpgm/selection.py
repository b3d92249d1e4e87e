"""Which filters to keep: scores and a rate to `keep`, convolution -> kept filters."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.coupling import RESIDUAL, Block, couple
from fpgm.criteria import CRITERIA
from fpgm.evidence import DATA, NEEDS, Evidence, gather, require
from fpgm.graph import trace


class SelectionError(ValueError):
    """A criterion or rate that cannot be followed."""


def pruned_count(filters: int, rate: float) -> int:
    """How many of a layer's filters go: floor(filters * rate), safe against rounding from below."""
    return int(filters * rate + 1e-9)


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
    blocks: Iterable[Block] | None = None,
    evidence: Evidence | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Choose the filters to keep, block by block; ties go by the lowest index. Changes nothing.

    criterion: a name in CRITERIA, `options` go to its function; residual: see fpgm.coupling;
    align: kept counts are multiples of it; seed: for `random`; blocks: what may be pruned, by
    default found in the network's graph; evidence: what fpgm.evidence.gather has found, for the
    criteria that look at more than the weight.
    Returns convolution -> kept filters, sorted. Raises SelectionError for an unknown criterion or
    mode, a rate outside [0, 1), one that would leave a layer empty, and scores that are no numbers;
    EvidenceError where the network lacks what the criterion looks at.
    """
    if criterion not in CRITERIA:
        raise SelectionError(f"criterion={criterion}: choose one of {', '.join(CRITERIA)}")
    if residual not in RESIDUAL:
        raise SelectionError(f"residual={residual}: choose one of {', '.join(RESIDUAL)}")
    if not 0 <= rate < 1:
        raise SelectionError(f"rate={rate}: must be at least 0 and below 1, for example rate=0.4")
    blocks = couple(trace(model), residual).blocks if blocks is None else blocks
    blocks = list(blocks)
    if criterion in NEEDS and evidence is None:
        evidence = _own_evidence(model, criterion, blocks)
    scores: dict[str, Tensor] = {}
    keep: dict[str, list[Tensor]] = {}
    for block, kept in zip(blocks, kept_counts(blocks, rate, align), strict=True):
        for name, _ in block.members:
            if name not in scores:
                own = (evidence or {}).get(name, {})
                scores[name] = _scores(model, name, criterion, rate, seed, own, options)
        ranking = _ranking(block_scores(block, scores))
        for name, filters in block.members:
            keep.setdefault(name, []).append(filters[ranking[len(block) - kept :].cpu()])
    return {name: torch.cat(parts).sort().values for name, parts in keep.items()}


def kept_counts(blocks: Sequence[Block], rate: float, align: int = 1) -> list[int]:
    """How many channels of each block stay. Raises SelectionError where a layer would be empty.

    It is the layer that is to have `kept_count` filters, and a layer may be made of several blocks
    (of a stream that grows by shortcuts A, the channels that were there before and the new ones).
    Each block follows its narrowest layer, and gets its share of what that one has still to keep.
    """
    sizes: Counter[str] = Counter()
    for block in blocks:
        sizes.update({name: len(block) for name, _ in block.members})
    undecided, decided = Counter(sizes), Counter[str]()
    counts = []
    for block in blocks:
        layer = min((name for name, _ in block.members), key=lambda name: sizes[name])
        target = kept_count(sizes[layer], rate, align)
        if target == 0:
            raise SelectionError(
                f"rate={rate}: would prune all {sizes[layer]} filters of {layer}; at most "
                f"{(sizes[layer] - 1) / sizes[layer]:.4g} leaves it one"
            )
        share = (target - decided[layer]) * len(block) / undecided[layer]
        kept = min(max(round(share), 0), len(block))
        for name, _ in block.members:
            undecided[name] -= len(block)
            decided[name] += kept
        counts.append(kept)
    return counts


def block_scores(block: Block, scores: Mapping[str, Tensor]) -> Tensor:
    """One score for each channel of a block, (n,).

    Layers differ in scale: where several write a channel, each layer's scores are divided by
    their mean over the layer, and the mean over the layers is taken.
    """
    if len(block.members) == 1:
        ((name, filters),) = block.members
        return scores[name][filters]
    parts = []
    for name, filters in block.members:
        mean = scores[name].mean()
        parts.append(scores[name][filters] / (mean if mean > 0 else 1))
    return torch.stack(parts).mean(0)


def _ranking(scores: Tensor) -> Tensor:
    """Indices, lowest score first; equal to 11 digits is a tie, and goes by the lowest index.

    Equal filters get scores that differ in the last bits by the order of summation.
    """
    largest = scores.abs().max()
    return torch.argsort((scores / largest * 1e11).round() if largest > 0 else scores, stable=True)


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
            raise SelectionError(f"criterion={criterion}: the evidence has no {key} of {name}")
        extra[key] = evidence[key]
    scores = CRITERIA[criterion](weight, **options, **extra)
    # -inf is a score, that of a filter that is pruned already (see fpgm.criteria).
    if not weight.isfinite().all() or not (scores < torch.inf).all():
        raise SelectionError(
            f"{name}: its weights, or the scores that criterion={criterion} gives them, are not "
            "finite (NaN or too large); start from other weights"
        )
    return scores


def _own_evidence(model: nn.Module, criterion: str, blocks: Iterable[Block]) -> Evidence:
    """What the network itself shows, without data. Raises EvidenceError, SelectionError."""
    layers = list(dict.fromkeys(name for block in blocks for name, _ in block.members))
    require(model, criterion, layers)
    if criterion in DATA:
        raise SelectionError(
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
            raise SelectionError(f"keep[{name!r}]: no such layer with a weight")
        if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < len(weight):
            raise SelectionError(f"keep[{name!r}] has indices outside 0..{len(weight) - 1}")
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
