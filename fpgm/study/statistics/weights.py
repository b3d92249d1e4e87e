"""What a layer's weights look like: does the assumption hold, can a norm tell its filters apart?

The Convolution-Weight-Distribution Assumption (Huang et al., "Rethinking the Criteria of Channel
Pruning", NeurIPS 2021): a layer's N filters of d weights follow N(0, S), S with nearly equal
variances and small correlations, those inside one kernel the largest. Where it holds, norms and
distances concentrate and most criteria rank alike. Its parts are tested one by one, each against a
null that the other parts do not enter, so that heavy tails are not called unequal variances.

Norms: pruning by them (FPGM, He et al., CVPR 2019, section 3.2) needs (1) norms that deviate
widely, else small and large mean nothing, and (2) a smallest norm near zero, else what goes
contributes, too. The paper gives no thresholds; ours are in fpgm.study.settings.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from fpgm.study.settings import DRAWS
from fpgm.study.statistics.agreement import Array

FEWEST = 8  # filters that the tests need
SHAPIRO = 50  # filters up to which Shapiro and Wilk's test is taken
POOL = 2000  # coordinates of Gaussian weights that p-values are compared with
MANY = 640_000  # more Gaussian weights, for their kurtosis
GROUPS = 16  # of filters that one draw permutes alike
CHANNELS = 48  # input channels whose correlations are computed
PARTS = ("normality", "mean", "variances")  # of the assumption, those that are tested
VERDICTS = {
    (True, True): "suits a norm",
    (False, True): "norms too alike",
    (True, False): "no norm near zero",
    (False, False): "too alike, none near zero",
}


def untestable(weight: Array) -> str | None:
    """Why the assumption cannot be tested on a layer's live filters (N, C, kH, kW)."""
    if len(weight) < FEWEST:
        return f"{len(weight)} filters, the tests need {FEWEST}"
    return None if (np.ptp(weight, axis=0) > 0).sum() > 1 else "constant weights"


def assumption(weight: Array, alpha: float, seed: int) -> dict[str, Any]:
    """All figures of one layer: (N, C, kH, kW) float64, its live filters, see `untestable`.

    Coordinates that are the same in all filters are `constant`, and no test takes them. *_p: of the
    tests, each of which has fallen in `failed` where p <= alpha. *_null: of Gaussian filters.
    """
    filters = weight.reshape(len(weight), -1)
    varying = np.ptp(filters, axis=0) > 0
    live = filters[:, varying]
    generator = np.random.default_rng([seed, *weight.shape])
    figures = {
        **_normality(live, alpha, generator), **_mean(live, alpha, generator),
        **_variances(live, generator), **_correlations(weight), **_concentration(filters),
    }  # fmt: skip
    return {
        "filters": len(filters), "coordinates": filters.shape[1],
        "constant": int((~varying).sum()),
        "failed": ", ".join(part for part in PARTS if figures[f"{part}_p"] <= alpha),
        **{key: _number(value) for key, value in figures.items()},
    }  # fmt: skip


# (a) Each coordinate, over the filters, is Gaussian.


def normal_p(filters: Array) -> Array:
    """p of every coordinate: Shapiro and Wilk's test up to 50 filters, else D'Agostino and
    Pearson's. (N, d) -> (d,)."""
    test = stats.shapiro if len(filters) <= SHAPIRO else stats.normaltest
    p: Array = test(filters, axis=0).pvalue
    return p


@cache
def _of_gaussian(filters: int) -> tuple[Array, float]:
    """p of coordinates that are Gaussian, and the median of their excess kurtosis. The p are not
    uniform: of 64 filters 0.4 % lie below 0.1 %, enough to reject something in any wide layer. The
    kurtosis is 0 on average; its median is -0.16 of 32 filters."""
    generator = np.random.default_rng(filters)
    coordinates = generator.standard_normal((filters, POOL))
    # Of few filters it scatters.
    more = generator.standard_normal((filters, MANY // filters))
    return normal_p(coordinates), _kurtosis(np.hstack((coordinates, more)))


def _kurtosis(filters: Array) -> float:
    return float(np.median(stats.kurtosis(filters, axis=0, bias=False)))


def _normality(filters: Array, alpha: float, generator: np.random.Generator) -> dict[str, Any]:
    """p: Kolmogorov and Smirnov's of the coordinates' p-values against those of Gaussian ones; ks:
    their distance from uniform ones, an effect; rejected: share under Benjamini and Hochberg."""
    p, (gaussian, kurtosis) = normal_p(filters), _of_gaussian(len(filters))
    null = [_rejected(generator.choice(gaussian, len(p)), alpha) for _ in range(20)]
    return {
        "normality_p": stats.ks_2samp(p, gaussian, method="asymp").pvalue,
        "normality_ks": stats.ks_1samp(p, stats.uniform.cdf).statistic,
        "normality_rejected": _rejected(p, alpha), "normality_rejected_null": np.mean(null),
        "excess_kurtosis": _kurtosis(filters), "excess_kurtosis_null": kurtosis,
    }  # fmt: skip


def _rejected(p: Array, alpha: float) -> float:
    """Share of the p-values (d,) that Benjamini and Hochberg's procedure rejects."""
    return float((stats.false_discovery_control(p) < alpha).mean())


# (b) Each coordinate has mean zero.


def _mean(filters: Array, alpha: float, generator: np.random.Generator) -> dict[str, Any]:
    """chi2: the sum of t_l^2, t_l = sqrt(N) m_l / s_l, beside its null: whole filters with random
    signs, which keep their tails and their correlations. over_std: root mean square of m_l / s_l,
    an effect; of Gaussian filters t_l^2 is (N - 1) / (N - 3) on average."""
    n = len(filters)
    signs = generator.choice([-1.0, 1.0], (DRAWS + 1, n))
    signs[0] = 1
    means, squares = signs @ filters / n, np.square(filters).sum(0)
    t2 = n * means**2 / ((squares - n * means**2) / (n - 1))
    found, *null = t2.sum(1)
    return {
        "mean_p": _share(null, found), "mean_chi2": found, "mean_chi2_null": np.mean(null),
        "mean_rejected": _rejected(2 * stats.t.sf(np.sqrt(t2[0]), n - 1), alpha),
        "mean_over_std": math.sqrt(t2[0].mean() / n),
        "mean_over_std_null": math.sqrt((n - 1) / (n - 3) / n),
    }  # fmt: skip


# (c) All coordinates have one variance.


def _variances(filters: Array, generator: np.random.Generator) -> dict[str, Any]:
    """p: of Bartlett's statistic, its null the coordinates of the filters permuted; bartlett_p: by
    its own chi^2, which holds for Gaussian weights alone; ratio: largest / least, an effect."""
    n, d = filters.shape
    null, high = _of_chi2(n, d)
    # About the median: a mean that one far weight pulls would add to the others of its coordinate.
    squares = np.square(filters - np.median(filters, axis=0))
    parts = np.array_split(squares[generator.permutation(n)], min(n, GROUPS))
    groups = np.stack([part.sum(0) for part in parts])
    rows = [groups.sum(0), *(generator.permuted(groups, axis=1).sum(0) for _ in range(DRAWS))]
    variances = np.stack([filters.var(0), *(row / n for row in rows)])
    with np.errstate(divide="ignore"):  # weights most of which are zero
        apart = np.log(variances.mean(1)) - np.log(variances).mean(1)
        ratio = variances[0].max() / variances[0].min()
    bartlett = apart[0] * (n - 1) * d / (1 + (d + 1) / (3 * d * (n - 1)))
    return {
        "variances_p": _share(apart[2:], apart[1]), "bartlett": bartlett,
        "bartlett_p": stats.chi2(d - 1).sf(bartlett), "variance_ratio": ratio,
        "variance_ratio_null": null, "variance_ratio_high": high,
    }  # fmt: skip


@cache
def _of_chi2(n: int, d: int) -> tuple[float, float]:
    """Largest / least of d variances of n Gaussian weights: its mean, and what 97.5 % lie below."""
    drawn = np.random.default_rng([n, d]).chisquare(n - 1, (DRAWS, d))
    ratios = drawn.max(1) / drawn.min(1)
    return float(ratios.mean()), float(np.quantile(ratios, 0.975))


def _share(null: Any, found: float) -> float:
    """p of a figure: how many of the null's and itself are as large."""
    return float((1 + (np.asarray(null) >= found).sum()) / (1 + len(null)))


# (d) Correlations are small, and (e) distances concentrate as norms do.


def _correlations(weight: Array) -> dict[str, Any]:
    """Mean |correlation| of two coordinates over the filters: of one kernel, and of different ones,
    beside that of independent Gaussian ones."""
    n, c = weight.shape[:2]
    some = np.unique(np.linspace(0, c - 1, min(c, CHANNELS)).astype(int))
    positions = weight[:, some].reshape(n, -1)
    with np.errstate(invalid="ignore", divide="ignore"):  # positions that are constant: nan
        size = np.abs(np.atleast_2d(np.corrcoef(positions, rowvar=False)))
    kernel = np.repeat(np.arange(len(some)), positions.shape[1] // len(some))
    same = kernel[:, None] == kernel
    means = [
        chosen[~np.isnan(chosen)].mean() if (~np.isnan(chosen)).any() else None
        for chosen in (size[same & ~np.eye(len(size), dtype=bool)], size[~same])
    ]
    return {
        "correlation_inside": means[0], "correlation_between": means[1],
        "correlation_null": math.sqrt(2 / (math.pi * (n - 1))),
    }  # fmt: skip


def _concentration(filters: Array) -> dict[str, Any]:
    """std / mean of the norms and of the distances of two filters. Both are chi distributed where
    filters are iid N(0, s^2 I), as a difference is N(0, 2 s^2 I)."""
    squares = np.square(filters).sum(1)
    distances = squares[:, None] + squares - 2 * filters @ filters.T
    distances = np.sqrt(np.maximum(distances[np.triu_indices(len(filters), 1)], 0))
    return {
        "cv_norms": stats.variation(np.sqrt(squares)), "cv_distances": stats.variation(distances),
        "cv_null": _chi_variation(filters.shape[1]),
    }  # fmt: skip


def _chi_variation(d: int) -> float:
    return float(stats.chi(d).std() / stats.chi(d).mean())


def _number(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def diagnose(norms: Array, weights: int, min_cv: float, max_minimum: float) -> dict[str, Any]:
    """FPGM's two requirements on the norms (N,) of a layer's live filters of `weights` weights.

    cv: standard deviation / mean; cv_iid: that of iid Gaussian filters (chi distribution).
    """
    figures = {
        "min": norms.min(), "median": np.median(norms), "max": norms.max(), "mean": norms.mean(),
        "std": norms.std(), "span": np.ptp(norms), "cv": stats.variation(norms),
        "cv_iid": _chi_variation(weights), "min_over_median": norms.min() / np.median(norms),
    }  # fmt: skip
    deviates = bool(figures["cv"] >= min_cv)
    near_zero = bool(figures["min_over_median"] <= max_minimum)
    return {
        "verdict": VERDICTS[deviates, near_zero], "suits_norm": deviates and near_zero,
        **{key: float(value) for key, value in figures.items()},
    }  # fmt: skip
