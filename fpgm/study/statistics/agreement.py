"""How far criteria agree about the same filters, and whether each can tell them apart.

Scores are `(K, N)`: a row for each criterion, a column for each filter; the lowest go first. What
is undefined (a criterion that gives all filters one score) is nan.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from fpgm.criteria import CRITERIA, tie_rate
from fpgm.selection.ranking import levelled, normalised, pruned_count

Array = NDArray[np.float64]
Masks = NDArray[np.bool_]
Shape = tuple[int, ...]
PERMUTATIONS = 20_000  # they give a standard deviation to 0.5 %
MANY = 256  # filters from which 1 / sqrt(n - 3) is nearer than that
WORK = 4e6  # weights drawn for a shape; small layers get more draws, as theirs scatter more
MOST = 200


def spearman(scores: Array) -> Array:
    """Spearman's rank correlation of every pair of criteria. (K, N) -> (K, K)."""
    # scipy.stats.spearmanr computes p-values as well, and gives a scalar for two rows.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(stats.rankdata(scores, axis=1)))


def tie_order(names: Sequence[str], layer: str, size: tuple[int, ...], seed: int) -> Array:
    """Uniform numbers that order filters of one score, each criterion's its own. (..., K, N).

    size: (..., N). Filters come sorted by their norms (fpgm.study.scores): were ties to go by
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


@cache
def by_chance(n: int, rates: tuple[float, ...]) -> dict[str, Array]:
    """What two criteria that have nothing to do with each other give: mean, 2.5 % and 97.5 %.

    Over random permutations of n filters, Spearman's rho has variance 1 / (n - 1) (Kendall 1948,
    ch. 4-5), about 0 and nearly normal; the number of filters in both pruned sets is
    hypergeometric, exactly. Returns spearman (3,), overlap (R, 3), and mean and deviation of
    Fisher's transformation of rho, fisher (2,), for `z`.
    """
    overlaps = np.full((len(rates), 3), np.nan)
    for row, rate in zip(overlaps, rates, strict=True):
        k = pruned_count(n, rate)
        if k:
            both = stats.hypergeom(n, k, k)
            shared = np.arange(k + 1)
            mean = (both.pmf(shared) * shared / (2 * k - shared)).sum()
            row[:] = mean, *(q / (2 * k - q) for q in both.ppf([0.025, 0.975]))
    end = min(stats.norm.ppf(0.975) / np.sqrt(n - 1), 1.0)
    return {
        "spearman": np.array([0.0, -end, end]),
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


# One criterion by itself.


def spread(scores: Array) -> dict[str, Array]:
    """How far scores (..., N) lie from each other. Each figure is (...).

    cv: std / |mean| (scipy.stats.variation); tie_rate: share of the filters whose score another
    has as well.
    """
    mean = np.abs(scores.mean(-1))
    return {
        "cv": scores.std(-1) / np.where(mean == 0, np.nan, mean),
        "tie_rate": tie_rate(torch.from_numpy(scores)).numpy(),
    }


def stability(scores: Array, again: Array, rates: Sequence[float], ties: Array) -> Array:
    """Mean Jaccard overlap of the pruned set with those of other scores; 1: nothing changes.

    scores (..., N), again (D, ..., N), ties (1 + D, ..., N) -> (R, ...). What ties alone decide is
    decided anew each time, so that a score that all filters share holds as well as chance does.
    """
    masks = pruned(np.concatenate((scores[None], again)), rates, ties)
    held: Array = jaccard(masks[:, :1], masks[:, 1:]).mean(1)
    return held


def in_one_ranking(layers: Sequence[Array], how: str) -> Array:
    """Scores of all layers made comparable as fpgm.select(scope="global") does, side by side.
    L of (..., N_l) -> (..., sum of N_l).

    By rank, filters of a layer with one score share their mean rank: select gives them ranks by
    place, which are here by norm.
    """
    if how == "rank":
        return np.concatenate([stats.rankdata(s, axis=-1) / s.shape[-1] for s in layers], axis=-1)
    parts = []
    for scores in layers:
        rows = torch.from_numpy(scores).reshape(-1, scores.shape[-1])
        parts.append(torch.stack([normalised(row, how) for row in rows]).reshape(scores.shape))
    side_by_side: Array = torch.cat(parts, -1).numpy()
    return side_by_side


def shares(scores: Array, filters: Sequence[int], rates: Sequence[float]) -> Array:
    """Share of each layer that one ranking over all prunes. (K, sum of N_l), L counts ->
    (R, K, L). Ties go by place, earlier layers first, as in fpgm.select."""
    masks = pruned(scores, rates, np.arange(scores.shape[-1], dtype=np.float64))
    parts = np.split(masks, np.cumsum(filters)[:-1], axis=-1)
    return np.stack([part.mean(-1) for part in parts], axis=-1)


def spread_of(draws: Array) -> Array:
    """Mean, low and high over the first axis. (D, ...) -> (3, ...).

    One more draw lies below low, or above high, in at most 2.5 % of all cases each, whatever the
    distribution: they are order statistics. It takes 39 draws; of fewer, which only large layers
    have, whose figures are nearly normal, it is Student's interval of one more.
    """
    count, mean = len(draws), draws.mean(0)
    k = int(0.025 * (count + 1))
    if k == 0:
        half = stats.t.ppf(0.975, count - 1) * draws.std(0, ddof=1) * np.sqrt(1 + 1 / count)
        return np.stack((mean, mean - half, mean + half))
    ordered = np.sort(draws, axis=0)
    return np.stack((mean, ordered[k - 1], ordered[-k]))


# The null: what criteria give on filters that differ by chance alone, iid Gaussian ones of the same
# shape. Whatever two criteria share on these is owed to what they compute, and says nothing about
# the network. Criteria that look at more than the weight have no such null, but `by_chance`.


def weight_only(names: Iterable[str]) -> list[str]:
    """Those that look at nothing but the weight."""
    return [name for name in names if not CRITERIA[name].views]


def count_draws(shape: Shape, least: int) -> int:
    """How many networks are drawn for a layer of this shape, at least `least`."""
    return max(least, min(MOST, int(WORK / np.prod(shape))))


def draw(shape: Shape, names: Sequence[str], count: int, seed: int) -> Array:
    """Scores of `count` layers of iid N(0, 1) filters (N, C, kH, kW) -> (count, K, N).

    Seeded by the shape alone, so that neither the order of the layers nor other layers matter.
    """
    generator = np.random.default_rng([seed, zlib.crc32(repr(shape).encode())])
    scores = np.empty((count, len(names), shape[0]))
    for i in range(count):
        weight = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        for k, name in enumerate(names):
            given = {} if follows_scale(name) else {"seed": int(generator.integers(2**31))}
            scores[i, k] = levelled(CRITERIA[name](weight, **given)).numpy()
    return scores


def follows_scale(name: str) -> bool:
    """Whether scores are proportional to the weights: all but those that a seed decides."""
    return "seed" not in CRITERIA[name].given


def figures(draws: Array, rates: Sequence[float]) -> dict[str, Array]:
    """Mean and 95 % interval of every figure of this module over the draws (D, K, N).

    Returns spearman (3, K, K), overlap (3, R, K, K), mean and deviation of Fisher's transformation
    of Spearman's rho, fisher (2, K, K), and cv (3, K).
    """
    generator = np.random.default_rng(draws.shape)  # for ties, which few draws have
    rho = np.stack([spearman(scores) for scores in draws])
    transformed = fisher(rho, draws.shape[-1])
    overlaps = [overlap(scores, rates, generator.random(scores.shape)) for scores in draws]
    return {
        "spearman": spread_of(rho),
        "fisher": np.stack((transformed.mean(0), transformed.std(0, ddof=1))),
        "overlap": spread_of(np.stack(overlaps)),
        "cv": spread_of(spread(draws)["cv"]),
    }


def whole_network(
    shapes: Sequence[Shape],
    deviations: Sequence[float],
    names: Sequence[str],
    nulls: dict[Shape, Array],
    generator: np.random.Generator,
) -> list[Array]:
    """Scores of a network of Gaussian filters, (K, N) for each layer.

    deviations: standard deviation of each layer's weights, which a ranking over layers may see.
    Layers of one shape get different ones of its draws.
    """
    scale = np.array([follows_scale(name) for name in names])[:, None]
    counts = sorted(Counter(shapes).items())  # so that the order of the layers does not matter
    chosen = {
        shape: iter(generator.choice(len(nulls[shape]), count, replace=False))
        for shape, count in counts
    }
    return [
        nulls[shape][next(chosen[shape])] * np.where(scale, deviation, 1.0)
        for shape, deviation in zip(shapes, deviations, strict=True)
    ]
