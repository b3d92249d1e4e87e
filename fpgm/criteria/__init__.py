"""Criteria: pure functions from a convolution's weight to one score for each filter.

`weight` is `(N, C, kH, kW)`; filter `F_j = weight[j].flatten()`. The result is `(N,)` in float64,
and the lowest scores are pruned first. A new criterion is one function and one entry in CRITERIA.

Criteria that look at more than the weight take it in one keyword argument, (N,) values that
fpgm.evidence gathers. To them a filter whose weight is all zero scores -inf: what BatchNorm makes
of it is no measure beside that of live filters, and a filter that is pruned and has not grown back
must never push out one that works.

Papers: FPGM (He et al., CVPR 2019), SFP (He et al., IJCAI 2018), PFEC (Li et al., ICLR 2017),
Network Slimming (Liu et al., ICCV 2017), Taylor (Molchanov et al., CVPR 2019), Network Trimming
(Hu et al., 2016), HRank (Lin et al., CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

Distance = Callable[[Tensor, Tensor], Tensor]


def l1(weight: Tensor) -> Tensor:
    """Sum of absolute weights of each filter (PFEC). (N, C, kH, kW) -> (N,)."""
    return _filters(weight).abs().sum(1)


def l2(weight: Tensor) -> Tensor:
    """Euclidean norm of each filter (SFP, eq. 2 with p = 2). (N, C, kH, kW) -> (N,)."""
    return _norms(_filters(weight))


def gm(weight: Tensor, distance: str = "l2") -> Tensor:
    """Sum of distances to the other filters of the layer (FPGM, eq. 4). (N, C, kH, kW) -> (N,).

    `distance` is one of DISTANCES. Only "l2" is the paper's; the others are its ablation.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r}: choose one of {', '.join(DISTANCES)}")
    return _summed(_filters(weight), DISTANCES[distance])


def fermat(weight: Tensor, iterations: int = 1000, tolerance: float = 1e-12) -> Tensor:
    """Distance to the layer's true geometric median (FPGM, eq. 2-3). (N, C, kH, kW) -> (N,).

    Where filters lie on one line the median need not be unique; one of the minimisers is used.
    """
    filters = _filters(weight)
    return _norms(filters - geometric_median(filters, iterations, tolerance))


def mix(weight: Tensor, pruned: int, norm_share: float = 0.25) -> Tensor:
    """FPGM-mix: part of the pruned filters by norm, the rest by geometric median. -> (N,).

    The score is the place in the order of pruning. Of the `pruned` filters, the first
    `floor(pruned * norm_share)` are the smallest by L2, the others the smallest by `gm` among the
    survivors, both on the same weights (the paper's 40 % = 10 % norm + 30 % geometric median).
    """
    by_norm = torch.argsort(l2(weight), stable=True)[: int(pruned * norm_share + 1e-9)]
    scores = gm(weight)
    place = torch.arange(len(scores), dtype=scores.dtype, device=scores.device)
    scores[by_norm] = place[: len(by_norm)] - len(by_norm)  # below every distance
    return torch.empty_like(scores).scatter_(0, torch.argsort(scores, stable=True), place)


def random(weight: Tensor, seed: int = 0) -> Tensor:
    """Uniform scores, the baseline that every comparison needs. (N, C, kH, kW) -> (N,)."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    return torch.rand(len(weight), generator=generator, dtype=torch.float64).to(weight.device)


def bn_gamma(weight: Tensor, *, gamma: Tensor) -> Tensor:
    """Absolute scale of the filter's BatchNorm (Network Slimming). (N, C, kH, kW), (N,) -> (N,)."""
    return _from_evidence(weight, gamma.abs(), "gamma")


def taylor(weight: Tensor, *, sensitivity: Tensor) -> Tensor:
    """How much the loss would change without the filter, to first order and squared (Taylor, with
    a gate on BatchNorm's output). (N, C, kH, kW), (N,) -> (N,).

    sensitivity: sum over minibatches of (gamma dL/dgamma + beta dL/dbeta)^2, which is (dL/dz)^2
    of a gate z = 1 behind the BatchNorm.
    """
    return _from_evidence(weight, sensitivity, "sensitivity")


def apoz(weight: Tensor, *, zeros: Tensor) -> Tensor:
    """Average share of zeros after ReLU, negated: the most silent filter goes first (Network
    Trimming). zeros: in 0..1. (N, C, kH, kW), (N,) -> (N,)."""
    return _from_evidence(weight, 0 - zeros, "zeros")


def hrank(weight: Tensor, *, ranks: Tensor) -> Tensor:
    """Mean rank of the filter's feature map after ReLU, over images (HRank).
    (N, C, kH, kW), (N,) -> (N,). Small maps tie often: see tie_rate."""
    return _from_evidence(weight, ranks, "ranks")


def tie_rate(scores: Tensor) -> Tensor:
    """Share of the filters whose score another filter has as well, 0..1. (..., N) -> (...)."""
    ordered = scores.sort(dim=-1).values
    equal = ordered[..., 1:] == ordered[..., :-1]
    edge = equal.new_zeros((*scores.shape[:-1], 1))
    shared = torch.cat((edge, equal), dim=-1) | torch.cat((equal, edge), dim=-1)
    return shared.double().mean(-1)


def geometric_median(points: Tensor, iterations: int = 1000, tolerance: float = 1e-12) -> Tensor:
    """The point with the least sum of Euclidean distances to `points` (N, d) -> (d,).

    Weiszfeld's iteration divides by zero on a data point. The only data point that can be the
    median is the one with the least sum, so that one is tested first (Vardi & Zhang 2000): it is
    the median where the pull of the other points does not exceed its multiplicity. If it is not,
    one step along the pull goes below the sum at every data point, and as the sum never rises
    again no later iterate can meet one.
    """
    start: Tensor = points[_summed(points, euclidean).argmin()]
    distance = _norms(points - start)
    scale = distance.mean()
    away = distance > tolerance * scale  # nearer ones are the same point: the pull hides them
    if not away.any():
        return start
    weights = 1 / distance[away]
    pull = ((points[away] - start) * weights[:, None]).sum(0)
    multiplicity = float((~away).sum())
    if pull.norm() <= multiplicity:
        return start
    median: Tensor = start + pull / weights.sum() * (1 - multiplicity / pull.norm())
    for _ in range(iterations):
        weights = 1 / _norms(points - median)
        new = (points * weights[:, None]).sum(0) / weights.sum()
        moved = (new - median).norm()
        median = new
        if moved <= tolerance * scale:
            break
    return median


def _filters(weight: Tensor) -> Tensor:
    """(N, C, kH, kW) -> (N, d) in float64, detached."""
    return weight.detach().flatten(1).double()


def _from_evidence(weight: Tensor, values: Tensor, name: str) -> Tensor:
    """(N,) float64 on the weight's device, -inf for filters that are all zero. Raises ValueError
    for another number of values than filters."""
    if values.shape != (len(weight),):
        raise ValueError(
            f"{name}: needs one value for each of the {len(weight)} filters, has the shape "
            f"{tuple(values.shape)}"
        )
    return below_live(values.detach().to(weight.device).double(), weight)


def below_live(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores with -inf for filters whose weight is all zero. (N,), (N, C, kH, kW) -> (N,)."""
    return scores.masked_fill(~weight.detach().flatten(1).any(1), -torch.inf)


def _norms(filters: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(filters, dim=1)
    return norms


def _summed(filters: Tensor, distance: Distance, block: int = 256) -> Tensor:
    """Sum of distances of each filter to all others. (N, d) -> (N,).

    Distances are symmetric: each block of rows meets only itself and what comes after it, which
    halves the work and keeps the memory at (block, N).

    Centred first, as no distance but the cosine changes under a translation and `euclidean` needs
    it for its digits: with the mean at the origin sum_i |a - x_i| >= N |a|, and so its loss of
    about sqrt(eps) * (|a| + |b|) a pair stays a few times 1.5e-8 of the sum, however near to each
    other the filters lie.
    """
    if distance is not cosine:
        filters = filters - filters.mean(0)
    sums = filters.new_zeros(len(filters))
    for start in range(0, len(filters), block):
        distances = distance(filters[start : start + block], filters[start:])
        distances.diagonal().zero_()
        sums[start : start + block] += distances.sum(1)
        sums[start + block :] += distances[:, block:].sum(0)
    return sums


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (m, d) -> (n, m) by |a|^2 + |b|^2 - 2ab: one matrix product, in place from there.

    Squares below 4e-14 of |a|^2 + |b|^2 are rounding (equal filters of 25,088 weights give up to
    1.6e-14) and made 0, so that equal filters get equal sums.
    """
    square, other = a.square().sum(1)[:, None], b.square().sum(1)
    distance = (a @ b.T).mul_(-2).add_(other).add_(square)
    rounding = distance < 4e-14 * (square + other)
    return distance.masked_fill_(rounding, 0).sqrt_()


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    """Sum of absolute differences. (n, d), (m, d) -> (n, m)."""
    return torch.cdist(a, b, p=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine; a zero filter has none: 1 to all others, 0 to zeros. (n, d), (m, d) -> (n, m)."""
    zero = ~a.any(1)[:, None] & ~b.any(1)
    cosines = normalize(a) @ normalize(b).T
    return (1 - cosines).masked_fill_(zero, 0)


DISTANCES: dict[str, Distance] = {"l2": euclidean, "l1": manhattan, "cosine": cosine}

CRITERIA: dict[str, Callable[..., Tensor]] = {
    "l1": l1,
    "l2": l2,
    "gm": gm,
    "fermat": fermat,
    "mix": mix,
    "random": random,
    "bn_gamma": bn_gamma,
    "taylor": taylor,
    "apoz": apoz,
    "hrank": hrank,
}
