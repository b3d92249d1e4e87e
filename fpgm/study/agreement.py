"""How far criteria agree about the same filters: rank correlations, and overlap of what would go.

Scores are `(K, N)`: a row for each criterion, a column for each filter; the lowest go first. What
is undefined (a criterion that gives all filters one score) is nan.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fpgm.selection.ranking import pruned_count

Array = NDArray[np.float64]
Masks = NDArray[np.bool_]
PERMUTATIONS = 20_000  # they give a standard deviation to 0.5 %
MANY = 256  # filters from which 1 / sqrt(n - 3) is nearer than that


def spearman(scores: Array) -> Array:
    """Spearman's rank correlation of every pair of criteria. (K, N) -> (K, K)."""
    # scipy.stats.spearmanr computes p-values as well, and gives a scalar for two rows.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(stats.rankdata(scores, axis=1)))


def kendall(scores: Array) -> Array:
    """Kendall's tau-b, which allows for ties, of every pair of criteria. (K, N) -> (K, K)."""
    count = len(scores)
    taus = np.where(np.ptp(scores, axis=1) > 0, 1.0, np.nan) * np.eye(count)
    for a in range(count):
        for b in range(a):
            # The p-value is not used, and the exact one takes time.
            found = stats.kendalltau(scores[a], scores[b], method="asymptotic").statistic
            taus[a, b] = taus[b, a] = found
    return taus


def tie_order(names: Sequence[str], layer: str, size: tuple[int, ...], seed: int) -> Array:
    """Uniform numbers that order filters of one score, each criterion's its own. (..., K, N).

    size: (..., N). Filters come sorted by their norms (fpgm.study.scoring): were ties to go by
    place, every criterion would agree with l2 as far as it is tied, and with itself whatever is
    done to it. Seeded by the names, so that what other criteria are asked for does not matter.
    """
    rows = [
        np.random.default_rng([seed, zlib.crc32(f"ties/{layer}/{name}".encode())]).random(size)
        for name in names
    ]
    return np.stack(rows, axis=-2)


def pruned(scores: Array, rates: Sequence[float], ties: Array) -> Masks:
    """Which filters each criterion prunes at each rate. (..., N) -> (R, ..., N).

    ties: numbers that broadcast to (..., N); of filters with one score the lowest goes first.
    """
    place = np.empty(scores.shape, dtype=np.int64)
    order = np.lexsort((np.broadcast_to(ties, scores.shape), scores), axis=-1)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(scores.shape[-1]), scores.shape), -1)
    counts = np.array([pruned_count(scores.shape[-1], rate) for rate in rates])
    masks: Masks = place[None] < counts.reshape(-1, *[1] * scores.ndim)
    return masks


def jaccard(a: Masks, b: Masks) -> Array:
    """Filters in both sets / filters in either. (..., N), (..., N) -> (...), nan for empty sets."""
    either = (a | b).sum(-1).astype(np.float64)
    either[either == 0] = np.nan
    shared: Array = (a & b).sum(-1) / either
    return shared


def overlap(scores: Array, rates: Sequence[float], ties: Array) -> Array:
    """Jaccard overlap of the sets that two criteria prune. (K, N), ties (K, N) -> (R, K, K)."""
    masks = pruned(scores, rates, ties)
    return jaccard(masks[:, :, None], masks[:, None])


def fisher(rho: Array, n: int) -> Array:
    """Fisher's transformation artanh(rho), which is nearly normal where rho itself is skewed.

    A rho of 1 counts as half a step below it: the next smaller one of n filters is a swap of two
    neighbours away, 12 / (n (n^2 - 1)).
    """
    edge = 1 - 6 / (n * (n**2 - 1))
    transformed: Array = np.arctanh(np.clip(rho, -edge, edge))
    return transformed


def by_chance(n: int, rates: Sequence[float]) -> dict[str, Array]:
    """What two criteria that have nothing to do with each other give: mean, 2.5 % and 97.5 %.

    Over random permutations of n filters, Spearman's rho has variance 1 / (n - 1), Kendall's tau
    (without ties) 2 (2n + 5) / (9n (n - 1)) (Kendall 1948, ch. 4-5), both about 0 and nearly
    normal; the number of filters in both pruned sets is hypergeometric, exactly.
    Returns spearman (3,), kendall (3,), overlap (R, 3), and mean and deviation of Fisher's
    transformation of rho, fisher (2,), for `z`.
    """
    overlaps = np.full((len(rates), 3), np.nan)
    for row, rate in zip(overlaps, rates, strict=True):
        k = pruned_count(n, rate)
        if k:
            both = stats.hypergeom(n, k, k)
            shared = np.arange(k + 1)
            mean = (both.pmf(shared) * shared / (2 * k - shared)).sum()
            row[:] = mean, *(q / (2 * k - q) for q in both.ppf([0.025, 0.975]))
    return {
        "spearman": _about_zero(np.sqrt(1 / (n - 1))),
        "kendall": _about_zero(np.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))),
        "overlap": overlaps,
        "fisher": np.array([0.0, _fisher_deviation(n)]),
    }


@cache
def _fisher_deviation(n: int) -> float:
    """Standard deviation of `fisher` over random permutations of n filters.

    It is larger than that of rho. Few filters have no closed form, as the steps of rho and its
    clipping matter: seeded permutations. For many it is Fisher's 1 / sqrt(n - 3).
    """
    if n >= MANY:
        return float(1 / np.sqrt(n - 3))
    places = np.arange(n) - (n - 1) / 2
    rows = np.broadcast_to(places, (PERMUTATIONS, n))
    rho = np.random.default_rng(n).permuted(rows, axis=1) @ places / (places @ places)
    return float(np.sqrt(np.square(fisher(rho, n)).mean()))  # about 0, where the mean is exactly


def _about_zero(std: float) -> Array:
    end = min(stats.norm.ppf(0.975) * std, 1.0)
    return np.array([0.0, -end, end])


def spread_of(draws: Array) -> Array:
    """Mean, low and high over the first axis. (D, ...) -> (3, ...).

    One more draw lies below low, or above high, in at most 2.5 % of all cases each, whatever the
    distribution: they are order statistics. It takes 39 draws; fewer give least and largest.
    """
    ordered = np.sort(draws, axis=0)
    k = max(int(0.025 * (len(draws) + 1)), 1)
    return np.stack((draws.mean(0), ordered[k - 1], ordered[-k]))
