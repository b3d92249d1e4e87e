"""What a user loses when one of these fails: figures of a study that can be believed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from scipy.spatial.distance import pdist
from torch import nn

import fpgm
from fpgm import criteria
from fpgm.study.settings import Settings
from fpgm.study.statistics.agreement import (
    by_chance,
    count_draws,
    draw,
    figures,
    fisher,
    follows_scale,
    in_one_ranking,
    jaccard,
    overlap,
    pruned,
    shares,
    spearman,
    spread,
    spread_of,
    stability,
    tie_order,
    whole_network,
)
from fpgm.study.statistics.tables import (
    BESIDE,
    Ranking,
    applicability,
    collapse,
    distance,
    first,
    held,
    overlaps,
    pairs,
    ranks,
    relation,
    similarity,
)
from fpgm.study.statistics.tables import criteria as summed_up
from fpgm.study.statistics.weights import PARTS, assumption, diagnose, normal_p, untestable
from fpgm.study.summary import lines

# Whole numbers from a small range: ties are common.
tied = hnp.arrays(
    np.float64,
    st.tuples(st.integers(2, 4), st.integers(4, 30)),
    elements=st.integers(-5, 5).map(float),
)


@given(tied)
@settings(deadline=None, max_examples=25)
def test_rank_correlation_is_scipys_also_with_ties(scores: np.ndarray) -> None:
    rho = spearman(scores)
    for i, a in enumerate(scores):
        for j, b in enumerate(scores):
            if np.ptp(a) == 0 or np.ptp(b) == 0:
                assert np.isnan(rho[i, j])
            else:
                assert rho[i, j] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


@given(tied)
@settings(deadline=None, max_examples=25)
def test_spread_is_scipys_and_ties_are_filters_that_share_their_score(scores: np.ndarray) -> None:
    found = spread(scores)
    dead = np.where(scores == scores.min(), -np.inf, scores)  # filters that are all zero
    rates = criteria.tie_rate(torch.from_numpy(dead))
    for i, row in enumerate(scores):
        counts = Counter(row.tolist())
        shared = sum(count for count in counts.values() if count > 1)
        assert found["tie_rate"][i] == pytest.approx(shared / len(row))
        assert rates[i] == pytest.approx(shared / len(row))
        if row.mean() != 0:
            assert found["cv"][i] == pytest.approx(abs(stats.variation(row)), abs=1e-12)
        else:
            assert np.isnan(found["cv"][i])


@given(tied, st.sampled_from([0.1, 0.3, 0.5, 0.7]))
@settings(deadline=None, max_examples=25)
def test_overlap_is_that_of_the_sets_that_would_be_pruned(scores: np.ndarray, rate: float) -> None:
    ties = tie_order([f"criterion {i}" for i in range(len(scores))], "a", scores.shape[1:], 0)
    sets = []
    for row, drawn in zip(scores.tolist(), ties.tolist(), strict=True):
        places = sorted(range(len(row)), key=lambda i, row=row, drawn=drawn: (row[i], drawn[i]))
        sets.append(set(places[: int(len(row) * rate + 1e-9)]))
    found = overlap(scores, [rate], ties)[0]
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            if a:
                assert found[i, j] == pytest.approx(len(a & b) / len(a | b))
            else:
                assert np.isnan(found[i, j])


def test_chance_is_what_unrelated_rankings_give() -> None:
    generator, n, rates = np.random.default_rng(0), 24, (0.25, 0.5)
    fixed = np.arange(n, dtype=float)
    draws = [np.stack((fixed, generator.permutation(n))) for _ in range(800)]
    expected = by_chance(n, rates)
    rho = np.array([spearman(scores)[0, 1] for scores in draws])
    ties = np.arange(n)
    both = np.array([overlap(scores, rates, ties)[:, 0, 1] for scores in draws])
    mean, low, high = expected["spearman"]
    assert abs(rho.mean() - mean) < 0.02
    assert abs(((rho < low) | (rho > high)).mean() - 0.05) < 0.02
    np.testing.assert_allclose(both.mean(0), expected["overlap"][:, 0], atol=0.01)
    assert ((both >= expected["overlap"][:, 1]) & (both <= expected["overlap"][:, 2])).mean() > 0.94


@pytest.mark.parametrize("n", [4, 6, 8])
def test_z_of_few_unrelated_filters_is_that_of_all_their_orders(n: int) -> None:
    orders = np.array(list(itertools.permutations(range(n))), dtype=float)
    centred = orders - orders.mean(1, keepdims=True)
    z = fisher(centred @ centred[0] / (centred[0] @ centred[0]), n)
    mean, deviation = by_chance(n, ())["fisher"]
    assert mean == pytest.approx(z.mean(), abs=1e-12)
    assert deviation == pytest.approx(z.std(), rel=0.02)


@pytest.mark.parametrize(("n", "draws"), [(16, 40_000), (32, 40_000), (255, 20_000), (256, 20_000)])
def test_z_of_unrelated_filters_has_deviation_one(n: int, draws: int) -> None:
    generator, fixed = np.random.default_rng(1000 + n), np.arange(n, dtype=float)
    others = generator.permuted(np.tile(fixed, (draws, 1)), axis=1)
    rho = spearman(np.vstack((fixed, others[:3])))[0, 1:]
    length = fixed.var() * n
    found = (others - fixed.mean()) @ (fixed - fixed.mean()) / length
    np.testing.assert_allclose(found[:3], rho)
    mean, deviation = by_chance(n, ())["fisher"]
    z = (fisher(found, n) - mean) / deviation
    assert z.std() == pytest.approx(1, abs=0.02)
    assert z.mean() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_tied_criterion_agrees_with_the_norm_and_itself_by_chance_alone(levels: int) -> None:
    n, rates = 16, (0.1, 0.4, 0.7)
    generator, norms = np.random.default_rng(levels), np.arange(n, dtype=float)
    against, held = [], []
    for layer in range(400):
        tied = generator.permutation(np.arange(n) % levels).astype(float)
        scores = np.stack((norms, tied))
        ties = tie_order(("l2", "tied"), f"layer {layer}", (11, n), 0)
        against.append(overlap(scores, rates, ties[0])[:, 0, 1])
        held.append(stability(scores, np.stack([scores] * 10), rates, ties))
    chance = by_chance(n, rates)["overlap"][:, 0]
    np.testing.assert_allclose(np.mean(against, axis=0), chance, atol=0.04)
    held_l2, held_tied = np.mean(held, axis=0).T
    np.testing.assert_array_equal(held_l2, 1)  # no ties: the same set each time
    # Filters wholly below the cut go each time; of the level at the cut, some by chance.
    for found, rate in zip(held_tied, rates, strict=True):
        k = int(n * rate + 1e-9)
        sizes = [len(range(level, n, levels)) for level in range(levels)]
        below = max(sum(sizes[:i]) for i in range(levels) if sum(sizes[:i]) < k)
        at = next(size for i, size in enumerate(sizes) if sum(sizes[: i + 1]) >= k)
        both = stats.hypergeom(at, k - below, k - below)
        shared = np.arange(k - below + 1)
        expected = (both.pmf(shared) * (below + shared) / (2 * k - below - shared)).sum()
        assert found == pytest.approx(expected, abs=0.04)


def test_ties_are_broken_the_same_whatever_other_criteria_are_asked_for() -> None:
    both, one = (tie_order(names, "a", (3, 8), 0) for names in (("l1", "hrank"), ("hrank",)))
    np.testing.assert_array_equal(both[:, 1], one[:, 0])
    drawn = [*both.reshape(6, 8), tie_order(("l1",), "b", (8,), 0)[0]]
    assert len({tuple(np.argsort(row)) for row in drawn}) == len(drawn)


@pytest.mark.parametrize("how", ["none", "mean", "l2", "rank"])
def test_ties_stay_ties_in_one_ranking(how: str) -> None:
    layers = [np.array([[3.0, 3, 3, 3]]), np.array([[1.0, 2, 2, 9, 9, 9]])]
    first, second = np.split(in_one_ranking(layers, how)[0], [4])
    assert np.ptp(first) == 0
    assert second[0] < second[1] == second[2] < second[3] == second[5]


@pytest.mark.parametrize(("count", "kind"), [(40, "exponential"), (10, "normal")])
def test_interval_of_the_null_holds_95_of_100_new_draws(count: int, kind: str) -> None:
    generator = np.random.default_rng(1)
    outside = []
    for _ in range(2000):
        draws = getattr(generator, kind)(size=count)  # the first are skewed
        _, low, high = spread_of(draws)
        outside.append(not low <= getattr(generator, kind)() <= high)
    assert 0.03 < np.mean(outside) < 0.065


def test_stability_by_hand() -> None:
    scores = np.array([[1.0, 2.0, 4.0, 9.0], [5.0, 5.0, 5.0, 5.0]])
    again, ties = np.stack((scores, scores[:, ::-1])), np.arange(4)
    # The same set once, and once the two other filters, or the same by ties.
    np.testing.assert_allclose(stability(scores, again, (0.5,), ties), [[0.5, 1.0]])
    np.testing.assert_allclose(jaccard(*pruned(scores, (0.5, 0.75), ties))[0], 2 / 3)


@pytest.mark.parametrize("how", ["none", "mean", "l2", "rank"])
def test_layers_lose_in_one_ranking_what_select_takes_from_them(how: str) -> None:
    torch.manual_seed(0)
    model = fpgm.model("resnet20")
    for i, module in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
        module.weight.data *= 1 + 0.2 * torch.rand(len(module.weight), 1, 1, 1) * (i % 4)
    rate = 0.15
    keep = fpgm.select(model, "l2", rate, scope="global", normalise=how, floor=0.0)
    weights = {name: model.get_submodule(name).weight for name in keep}
    layers = [criteria.CRITERIA["l2"](w).detach().numpy()[None] for w in weights.values()]
    sizes = [len(weight) for weight in weights.values()]
    found = shares(in_one_ranking(layers, how), sizes, [rate])[0, 0]
    kept = {name: len(keep[name]) / len(weights[name]) for name in keep}
    if all(share < 1 for share in found):  # select leaves every layer one filter
        assert kept == pytest.approx(dict(zip(keep, 1 - found, strict=True)))
    else:
        assert how == "none"


@pytest.mark.parametrize("name", ["l1", "l2", "gm", "fermat", "random"])
def test_scores_of_the_null_may_be_scaled_to_each_layer(name: str) -> None:
    weight = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    factor = 2.5 if follows_scale(name) else 1.0
    score = criteria.CRITERIA[name]
    torch.testing.assert_close(score(2.5 * weight), factor * score(weight))


def test_null_is_computed_from_the_shape_and_the_seed_alone() -> None:
    shape, names = (8, 3, 3, 3), ("l1", "gm")
    one, other = draw(shape, names, 5, 0), draw(shape, names, 5, 1)
    np.testing.assert_array_equal(one, draw(shape, names, 5, 0))
    assert not np.array_equal(one, other)
    found = figures(draw(shape, ("l1", "l2"), 60, 0), (0.5,))
    assert found["spearman"][1, 0, 1] < found["spearman"][0, 0, 1] < found["spearman"][2, 0, 1]
    assert count_draws((2048, 512, 1, 1), 40) == 40 < count_draws(shape, 40)
    network = whole_network([shape] * 3, [1, 1, 2], names, {shape: one}, np.random.default_rng(0))
    means = {round(float(layer[0, 0]), 9) for layer in network}
    assert len(means) == 3  # layers of one shape are different draws


def weights(kind: str, seed: int, shape: tuple[int, ...] = (64, 3, 3, 3)) -> np.ndarray:
    generator = np.random.default_rng([seed, 1])
    if kind == "heavy tails":
        return generator.standard_t(3, shape)
    weight = generator.standard_normal(shape)
    if kind == "one coordinate times 3":
        weight[:, 0, 0, 0] *= 3
    return weight + (0.3 if kind == "shifted" else 0)


@pytest.mark.parametrize(
    ("kind", "fails"),
    [("gaussian", None), ("heavy tails", "normality"), ("shifted", "mean"),
     ("one coordinate times 3", "variances")],
)  # fmt: skip
def test_each_control_fails_its_own_test_and_the_others_at_the_nominal_rate(
    kind: str, fails: str | None
) -> None:
    found = [assumption(weights(kind, seed), 0.05, 0) for seed in range(200)]
    for part in PARTS:
        rate = np.mean([part in one["failed"].split(", ") for one in found])
        if part == fails:
            assert rate > 0.95
        else:  # 99.8 % of binomial draws of 0.05
            assert rate <= stats.binom(200, 0.05).ppf(0.998) / 200, part
        assert rate == np.mean([one[f"{part}_p"] <= 0.05 for one in found])


def test_every_layer_of_a_fresh_network_passes() -> None:
    torch.manual_seed(0)
    convolutions = [m for m in fpgm.model("resnet20").modules() if isinstance(m, nn.Conv2d)]
    layers = [module.weight.detach().double().numpy() for module in convolutions]
    assert sum(bool(assumption(weight, 0.01, 0)["failed"]) for weight in layers) <= 1


@pytest.mark.parametrize(("filters", "test"), [(20, stats.shapiro), (64, stats.normaltest)])
def test_figures_of_the_assumption_are_scipys_and_numpys(filters: int, test: Callable) -> None:
    weight = weights("heavy tails", 3, (filters, 6, 3, 3))
    flat = weight.reshape(filters, -1)
    found = assumption(weight, 0.01, 0)
    assert (found["filters"], found["coordinates"], found["constant"]) == (filters, 54, 0)
    p = [test(column).pvalue for column in flat.T]
    np.testing.assert_allclose(normal_p(flat), p)
    ordered = np.sort(p)  # Benjamini and Hochberg by hand
    below = np.flatnonzero(ordered < 0.01 * np.arange(1, 55) / 54)
    assert found["normality_rejected"] == (below[-1] + 1 if len(below) else 0) / 54
    assert found["normality_ks"] == pytest.approx(stats.kstest(p, "uniform").statistic)
    kurtosis = np.median(stats.kurtosis(flat, bias=False))
    assert found["excess_kurtosis"] == pytest.approx(kurtosis)
    t = stats.ttest_1samp(flat, 0)
    assert found["mean_chi2"] == pytest.approx((t.statistic**2).sum())
    assert found["mean_rejected"] == (stats.false_discovery_control(t.pvalue) < 0.01).mean()
    over = flat.mean(0) / flat.std(0, ddof=1)
    assert found["mean_over_std"] == pytest.approx(np.sqrt((over**2).mean()))
    bartlett = stats.bartlett(*flat.T)
    assert found["bartlett"] == pytest.approx(bartlett.statistic)
    assert found["bartlett_p"] == pytest.approx(bartlett.pvalue)
    r = np.abs(np.corrcoef(flat.T))
    group = np.kron(np.eye(6), np.ones((9, 9))).astype(bool)
    assert found["correlation_inside"] == pytest.approx(r[group & ~np.eye(54, dtype=bool)].mean())
    assert found["correlation_between"] == pytest.approx(r[~group].mean())
    assert found["cv_norms"] == pytest.approx(stats.variation(np.linalg.norm(flat, axis=1)))
    assert found["cv_distances"] == pytest.approx(stats.variation(pdist(flat)))


@pytest.mark.parametrize("shape", [(64, 3, 3, 3), (256, 32, 3, 3), (256, 128, 1, 1)])
def test_effects_of_gaussian_filters_are_near_what_stands_beside_them(shape: tuple) -> None:
    found = assumption(weights("gaussian", 0, shape), 0.01, 0)
    for effect, null in BESIDE.values():
        if found[effect] is not None:
            assert found[effect] == pytest.approx(found[null], rel=0.2), effect
    beside = abs(found["excess_kurtosis"] - found["excess_kurtosis_null"])
    assert beside < 2.3 / np.sqrt(found["coordinates"])  # three standard errors of a median
    assert (found["correlation_inside"] is None) == (shape[2] == 1)
    assert found["mean_chi2"] == pytest.approx(found["mean_chi2_null"], rel=0.3)
    assert found["variance_ratio"] < found["variance_ratio_high"]


@pytest.mark.parametrize("filters", [8, 32])
def test_what_stands_beside_an_effect_is_of_gaussian_filters_whatever_the_layer_has(
    filters: int,
) -> None:
    shape = (filters, 4, 3, 3)
    drawn = [assumption(weights("gaussian", seed, shape), 0.01, 0) for seed in range(200)]
    lengths = np.geomspace(0.1, 10, filters).reshape(-1, 1, 1, 1)
    others = [
        assumption(weights("heavy tails", 0, shape), 0.01, 0),
        assumption(weights("gaussian", 0, shape) * lengths, 0.01, 0),
    ]
    for effect in ("variance_ratio", "mean_over_std", "excess_kurtosis"):
        (null,) = {one[f"{effect}_null"] for one in [*drawn, *others]}
        of_gaussian = np.mean([one[effect] for one in drawn])
        assert null == pytest.approx(of_gaussian, rel=0.05, abs=0.04), effect


@pytest.mark.parametrize(("r", "holds"), [(0.35, True), (0.8, False)])
def test_tests_hold_with_the_correlations_of_trained_kernels_and_not_with_any(
    r: float, holds: bool
) -> None:
    rejected = dict.fromkeys(PARTS, 0)
    for seed in range(150):
        generator = np.random.default_rng(seed)
        own = generator.standard_normal((16, 16, 3, 3))
        common = generator.standard_normal((16, 16, 1, 1))
        found = assumption(np.sqrt(1 - r) * own + np.sqrt(r) * common, 0.05, 0)
        for part in found["failed"].split(", "):
            if part:
                rejected[part] += 1
    most = stats.binom(150, 0.05).ppf(0.998)
    assert rejected["mean"] <= most
    assert (max(rejected["normality"], rejected["variances"]) <= most) == holds


def test_correlated_kernels_and_filters_of_unlike_length_are_seen_in_their_effects() -> None:
    generator = np.random.default_rng(0)
    weight = weights("gaussian", 0, (64, 8, 3, 3))
    correlated = assumption(weight + generator.standard_normal((64, 8, 1, 1)), 0.01, 0)
    assert correlated["correlation_inside"] == pytest.approx(0.5, abs=0.05)
    assert correlated["correlation_between"] < 0.15
    unlike = assumption(weight * np.linspace(0.1, 2, 64).reshape(-1, 1, 1, 1), 0.01, 0)
    assert min(unlike["cv_norms"], unlike["cv_distances"]) > 3 * unlike["cv_null"]


def test_layers_that_no_test_can_take_say_why() -> None:
    weight = weights("gaussian", 0, (16, 3, 3, 3))
    assert untestable(weight) is None
    assert untestable(weight[:7]) == "7 filters, the tests need 8"
    assert untestable(np.ones((16, 3, 3, 3))) == "constant weights"
    weight[:, 1] = 0.5  # an input that nothing has learnt from
    found = assumption(weight, 0.01, 0)
    assert (found["coordinates"], found["constant"]) == (27, 9)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([0.01, 1, 2, 3], "suits a norm"),
        ([1.0, 1.01, 0.99, 1.02], "too alike, none near zero"),
        ([0.5, 1, 2, 3], "no norm near zero"),
        ([0.05, *[1.0] * 60], "norms too alike"),
    ],
)
def test_diagnosis_asks_for_both_of_fpgms_requirements(norms: list[float], expected: str) -> None:
    found = diagnose(np.array(norms), 27, Settings.min_cv, Settings.max_minimum)
    assert found["verdict"] == expected
    assert found["cv"] == pytest.approx(stats.variation(norms))


@pytest.mark.parametrize("d", [27, 576, 4608])
def test_norms_of_iid_filters_deviate_as_the_diagnosis_says(d: int) -> None:
    norms = np.linalg.norm(np.random.default_rng(0).standard_normal((4000, d)), axis=1)
    found = diagnose(norms, d, Settings.min_cv, Settings.max_minimum)
    assert found["cv"] == pytest.approx(found["cv_iid"], rel=0.05)
    assert found["cv_iid"] == pytest.approx(1 / np.sqrt(2 * d), rel=0.02)


@pytest.mark.parametrize(
    ("spearman", "null", "z", "said"),
    [
        (0.9981, 0.9999, -9.0, "0 agree more than on Gaussian filters, 0 less"),
        (0.9999, 0.9981, 9.0, "0 agree more than on Gaussian filters, 0 less"),
        (0.93, 0.95, -9.0, "0 agree more than on Gaussian filters, 1 less"),
        (0.95, 0.93, 9.0, "1 agree more than on Gaussian filters, 0 less"),
        (0.95, 0.53, 2.9, "0 agree more than on Gaussian filters, 0 less"),
    ],
)
def test_no_difference_is_named_that_digits_do_not_show_or_chance_may_have_made(
    spearman: float, null: float, z: float, said: str
) -> None:
    pair = {
        "a": "gm", "b": "fermat", "null": "gaussian", "relation": relation(spearman, null, z),
        "spearman": spearman, "spearman_null": null, "least": 0.9, "least_layer": "conv1",
        "global": None, "global_null": None,
    }  # fmt: skip
    empty = dict.fromkeys(
        ("layers", "left_out", "notes", "overlap", "criteria", "collapse", "assumption",
         "diagnosis"), ()
    )  # fmt: skip
    limits = {"rates": (0.4,), "normalise": "mean", "alpha": 0.01}
    found = lines({**empty, "network": "a test", "settings": limits, "pairs": [pair]})
    assert f"of 1 pairs of the weights alone {said} (mean Spearman {spearman:.2f}, " in found[2]


def pair(layer: str, spearman: float, z: float, scope: str = "layer") -> dict:
    return {"scope": scope, "layer": layer, "a": "l1", "b": "gm", "null": "gaussian", "draws": 10,
            "spearman": spearman, "spearman_null": 0.5, "spearman_low": 0.4, "spearman_high": 0.6,
            "z": z}  # fmt: skip


def test_layers_of_one_shape_share_the_error_of_their_null() -> None:
    shapes = {"a": "16x3", "b": "16x3", "c": "32x3"}
    rows = [pair("a", 0.7, 2.0), pair("b", 0.7, 4.0), pair("c", 0.7, 1.5)]
    # m + m^2 / D of each shape: 2 + 4 / 10 and 1 + 1 / 10
    assert distance(rows, shapes) == pytest.approx(7.5 / (2.4 + 1.1) ** 0.5)
    assert distance([{**row, "draws": None} for row in rows], shapes) == pytest.approx(7.5 / 3**0.5)
    assert distance([{**rows[0], "z": None}], shapes) is None


def test_pair_is_summed_up_over_its_layers_beside_the_network() -> None:
    rows = [pair("a", 0.7, 5.0), pair("b", 0.3, -4.0), pair("c", 0.5, 0.0), pair("d", 0.62, 3.0)]
    study = {
        "layers": [{"layer": name, "shape": name} for name in "abcd"],
        "similarity": [*rows, pair("", 0.9, 6.0, "global")],
    }
    (row,) = pairs(study)
    assert (row["layers"], row["layers_above"], row["layers_below"]) == (4, 2, 1)
    assert (row["least"], row["least_layer"]) == (0.3, "b")
    assert row["spearman"] == pytest.approx(0.53)
    assert row["z"] == pytest.approx(4 / 4.4**0.5)
    assert (row["relation"], row["global_relation"]) == ("as", "above")
    assert row["global_z"] == pytest.approx(6 / 1.1**0.5)


@pytest.mark.parametrize(("z", "said"), [(3.0, "as"), (3.01, "above"), (-3.01, "below")])
def test_three_deviations_are_not_enough_and_more_are(z: float, said: str) -> None:
    assert relation(0.6, 0.5, z) == said


def test_criterion_is_summed_up_by_medians_of_its_layers() -> None:
    layers = [
        {"scope": scope, "criterion": "taylor", "cv": cv, "cv_null": cv / 2, "tie_rate": cv}
        for scope, cv in (("layer", 1.0), ("layer", 2.0), ("layer", 9.0), ("global", 100.0))
    ]
    kept = [{"criterion": "taylor", "stability": share} for share in (0.2, 0.3, 0.7, None)]
    (row,) = summed_up({"applicability": layers, "stability": kept})
    assert (row["rankings"], row["cv"], row["cv_null"], row["tie_rate"]) == (3, 2, 1, 4)
    assert row["stability"] == pytest.approx(0.4)
    (row,) = summed_up({"applicability": layers, "stability": []})
    assert row["stability"] is None


def test_layer_has_collapsed_at_the_limit_itself() -> None:
    (row,) = collapse(("l1",), ("a", "b", "c"), np.array([[[0.9, 0.89, 1.0]]]), (0.5,))
    assert (row["layers"], row["collapsed"], row["largest_share"]) == (2, "a, c", 1.0)


def test_figures_and_their_distance_stand_where_they_belong() -> None:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((2, 20))
    scores[1] += 2 * scores[0]
    gaussian = figures(generator.standard_normal((30, 2, 20)) + 1, (0.25, 0.5))
    where = {"scope": "layer", "layer": "a"}
    ranking = Ranking(
        where, ("l1", "gm"), (0.25, 0.5), scores, np.zeros((2, 20)), gaussian, 30
    )  # fmt: skip
    (row,) = similarity(ranking)
    rho = stats.spearmanr(*scores).statistic
    assert row["spearman"] == pytest.approx(rho)
    mean, deviation = gaussian["fisher"][:, 0, 1]
    assert row["z"] == pytest.approx((np.arctanh(rho) - mean) / deviation)
    assert row["spearman_high"] == gaussian["spearman"][2, 0, 1]
    assert [r["jaccard_null"] for r in overlaps(ranking)] == list(gaussian["overlap"][0, :, 0, 1])
    beside = dataclasses.replace(ranking, names=("l1", "taylor"))
    (chance,) = similarity(beside)
    assert (chance["null"], chance["draws"], chance["spearman_null"]) == ("chance", None, 0)
    assert chance["z"] == pytest.approx(np.arctanh(rho) / by_chance(20, ())["fisher"][1])
    spreads = applicability(beside)
    assert spreads[0]["cv_high"] == gaussian["cv"][2, 0]
    assert spreads[1]["cv_high"] is None
    again = {"taylor": np.stack((scores[1], -scores[1]))}
    rows = held(beside, again, 0)
    assert [(r["criterion"], r["rate"]) for r in rows] == [("taylor", 0.25), ("taylor", 0.5)]
    assert [r["stability"] for r in rows] == [0.5, 0.5]  # the same set, and one apart from it


def test_ranks_begin_with_what_goes_first_and_equal_scores_share_one() -> None:
    scores = {"l1": np.array([3.0, 1.0, 1.0]), "gm": np.array([0.5, 0.1, 0.3])}
    rows = ranks("a", [7, 0, 4], scores)
    assert [(r["criterion"], r["filter"], r["score"], r["rank"]) for r in rows] == [
        ("l1", 0, 1.0, 1), ("l1", 4, 1.0, 1), ("l1", 7, 3.0, 3),
        ("gm", 0, 0.1, 1), ("gm", 4, 0.3, 2), ("gm", 7, 0.5, 3),
    ]  # fmt: skip
    layer, chosen = first({"layers": [{"layer": "a"}], "ranks": rows})
    assert (layer, chosen) == ("a", {"l1": [0, 4, 7], "gm": [0, 4, 7]})


def test_null_of_a_figure_is_what_its_draws_give() -> None:
    draws = np.random.default_rng(0).standard_normal((50, 2, 12)) + 3
    null = figures(draws, (0.5,))
    rho = np.array([stats.spearmanr(*scores).statistic for scores in draws])
    z = np.arctanh(rho)
    np.testing.assert_allclose(null["fisher"][:, 0, 1], [z.mean(), z.std(ddof=1)])
    assert null["spearman"][0, 0, 1] == pytest.approx(rho.mean())
    np.testing.assert_allclose(null["cv"][0], stats.variation(draws, axis=-1).mean(0))


def test_diagnosis_is_by_the_median_and_the_limits_count() -> None:
    norms = np.array([0.1, 1.0, 1.0, 4.0])
    found = diagnose(norms, 27, float(stats.variation(norms)), 0.1)
    assert found["min_over_median"] == 0.1
    assert found["suits_norm"]
    assert (found["span"], found["max"]) == (pytest.approx(3.9), 4.0)
