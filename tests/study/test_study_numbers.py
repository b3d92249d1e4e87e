"""What a user loses when one of these fails: figures of a study that can be believed."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import nn

import fpgm
from fpgm import criteria
from fpgm.study.agreement import (
    by_chance,
    comparable,
    count_draws,
    draw,
    figures,
    fisher,
    follows_scale,
    gaps,
    in_one_ranking,
    jaccard,
    kendall,
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
from fpgm.study.settings import Settings
from fpgm.study.summary import lines
from fpgm.study.tables import (
    Ranking,
    applicability,
    collapse,
    cuts,
    distance,
    overlaps,
    pairs,
    relation,
    similarity,
)
from fpgm.study.tables import criteria as summed_up
from fpgm.study.weights import anderson, battery, density, diagnose, verdict

LIMITS = (Settings.alpha, Settings.max_skew, Settings.max_kurtosis)
# Whole numbers from a small range: ties are common.
tied = hnp.arrays(
    np.float64,
    st.tuples(st.integers(2, 4), st.integers(4, 30)),
    elements=st.integers(-5, 5).map(float),
)


@given(tied)
@settings(deadline=None, max_examples=25)
def test_rank_correlations_are_scipys_also_with_ties(scores: np.ndarray) -> None:
    rho, tau = spearman(scores), kendall(scores)
    for i, a in enumerate(scores):
        for j, b in enumerate(scores):
            if np.ptp(a) == 0 or np.ptp(b) == 0:
                assert np.isnan(rho[i, j])
                assert np.isnan(tau[i, j])
            else:
                assert rho[i, j] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
                assert tau[i, j] == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)


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
    tau = np.array([kendall(scores)[0, 1] for scores in draws[:500]])
    ties = np.arange(n)
    both = np.array([overlap(scores, rates, ties)[:, 0, 1] for scores in draws])
    for found, (mean, low, high) in ((rho, expected["spearman"]), (tau, expected["kendall"])):
        assert abs(found.mean() - mean) < 0.02
        assert abs(((found < low) | (found > high)).mean() - 0.05) < 0.02
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
    apart = [np.array([[1.0, 3, 2]]), np.array([[5.0, 4]])]
    sides = np.concatenate([comparable(scores, how) for scores in apart], axis=-1)
    np.testing.assert_allclose(in_one_ranking(apart, how), sides)


def test_interval_of_the_null_holds_95_of_100_new_draws() -> None:
    generator = np.random.default_rng(1)
    outside = []
    for _ in range(2000):
        draws = generator.exponential(size=40)  # skewed: no normal interval would hold
        _, low, high = spread_of(draws)
        outside.append(not low <= generator.exponential() <= high)
    assert 0.03 < np.mean(outside) < 0.065


def test_gap_at_the_cut_and_stability_by_hand() -> None:
    scores = np.array([[1.0, 2.0, 4.0, 9.0], [5.0, 5.0, 5.0, 5.0]])
    found = gaps(scores, (0.1, 0.25, 0.5, 0.75))
    assert np.isnan(found[0]).all()  # nothing is pruned
    np.testing.assert_allclose(found[1:, 0], np.array([1, 2, 5]) / scores[0].std())
    assert np.isnan(found[:, 1]).all()
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
    layers = [comparable(criteria.CRITERIA["l2"](w).numpy()[None], how) for w in weights.values()]
    found = shares(layers, [rate])[0, 0]
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


def layer(kind: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "gaussian":
        return generator.normal(0, 0.05, shape)
    return 0.05 * generator.standard_t(3, shape)


SHAPES = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 64, 3, 3), (256, 64, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_layers_pass_and_heavy_tails_fail(shape: tuple[int, ...]) -> None:
    for seed in range(20):
        assert verdict(battery(layer("gaussian", seed, shape), 0), *LIMITS) == "gaussian"
        assert verdict(battery(layer("student", seed, shape), 0), *LIMITS) == "not gaussian"


def test_every_layer_of_a_fresh_network_passes() -> None:
    torch.manual_seed(0)
    for module in fpgm.model("resnet20").modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().double().numpy()
            assert verdict(battery(weight, 0), *LIMITS) == "gaussian"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_battery_is_scipys_and_numpys() -> None:
    weight = layer("student", 3, (20, 6, 3, 3))
    found, values = battery(weight, 0), weight.ravel()
    assert found["sampled"] == values.size
    assert found["skew"] == pytest.approx(stats.skew(values))
    assert found["excess_kurtosis"] == pytest.approx(stats.kurtosis(values))
    assert found["p"] == pytest.approx(stats.normaltest(values).pvalue)
    assert found["anderson"] == pytest.approx(stats.anderson(values, "norm").statistic)
    ks = stats.kstest(values, "norm", args=(values.mean(), values.std())).statistic
    assert found["ks"] == pytest.approx(ks)
    r = np.abs(np.corrcoef(weight.reshape(20, -1).T))
    group = np.kron(np.eye(6), np.ones((9, 9))).astype(bool)
    assert found["correlation_inside"] == pytest.approx(r[group & ~np.eye(54, dtype=bool)].mean())
    assert found["correlation_between"] == pytest.approx(r[~group].mean())
    variances = weight.reshape(20, -1).var(0, ddof=1)
    assert found["variance_cv"] == pytest.approx(stats.variation(variances))
    unit = weight.reshape(20, -1) / np.linalg.norm(weight.reshape(20, -1), axis=1)[:, None]
    cosines = [abs(a @ b) for i, a in enumerate(unit) for b in unit[:i]]
    assert found["cosine"] == pytest.approx(np.mean(cosines))


def test_battery_of_iid_weights_is_near_what_stands_beside_it() -> None:
    found = battery(layer("gaussian", 0, (256, 32, 3, 3)), 0)
    for figure, beside in (
        ("variance_cv", "variance_cv_iid"),
        ("correlation_inside", "correlation_iid"),
        ("correlation_between", "correlation_iid"),
        ("cosine", "cosine_iid"),
    ):
        assert found[figure] == pytest.approx(found[beside], rel=0.12)
    pointwise = battery(layer("gaussian", 0, (64, 32, 1, 1)), 0)
    assert pointwise["correlation_inside"] is None
    assert battery(np.ones((8, 2, 3, 3)), 0)["p"] is None
    assert verdict(battery(np.ones((8, 2, 3, 3)), 0), *LIMITS) == "constant"


@given(hnp.arrays(np.float64, 200, elements=st.floats(-3, 3)))
@settings(deadline=None, max_examples=20)
def test_anderson_darling_is_scipys(noise: np.ndarray) -> None:
    sample = noise + np.random.default_rng(0).normal(size=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert anderson(sample) == pytest.approx(stats.anderson(sample, "norm").statistic, rel=1e-9)


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


def test_density_is_scipys_and_covers_all_norms() -> None:
    norms = np.random.default_rng(0).gamma(3, size=50)
    found = density(norms)
    np.testing.assert_allclose(found["y"], stats.gaussian_kde(norms)(found["x"]))
    assert min(found["x"]) < norms.min() < norms.max() < max(found["x"])
    assert np.trapezoid(found["y"], found["x"]) == pytest.approx(1, abs=0.1)
    assert density(np.ones(5)) == {"x": [], "y": []}


@pytest.mark.parametrize(
    ("spearman", "null", "z", "said"),
    [
        (0.9981, 0.9999, -9.0, "as alike as their null gm-fermat 1.00 / 1.00"),
        (0.9999, 0.9981, 9.0, "as alike as their null gm-fermat 1.00 / 1.00"),
        (0.93, 0.95, -9.0, "less alike than their null gm-fermat 0.93 / 0.95"),
        (0.95, 0.93, 9.0, "more alike than their null gm-fermat 0.95 / 0.93"),
        (0.95, 0.53, 2.9, "as alike as their null gm-fermat 0.95 / 0.53"),
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
        ("layers", "left_out", "notes", "overlap", "criteria", "collapse", "distribution",
         "diagnosis"), ()
    )  # fmt: skip
    limits = {"rates": (0.4,), "scopes": ("layer",), "normalise": "mean", "collapse": 0.9}
    found = lines({**empty, "network": "a test", "settings": limits, "pairs": [pair]})
    assert f"(mean Spearman / null): {said}." in found[2]


def pair(layer: str, spearman: float, z: float, scope: str = "layer") -> dict:
    return {"scope": scope, "layer": layer, "a": "l1", "b": "gm", "null": "gaussian", "draws": 10,
            "spearman": spearman, "spearman_null": 0.5, "spearman_low": 0.4, "spearman_high": 0.6,
            "z": z, "kendall": spearman / 2, "kendall_null": 0.25}  # fmt: skip


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
    assert (row["spearman"], row["kendall"]) == (pytest.approx(0.53), pytest.approx(0.265))
    assert row["z"] == pytest.approx(4 / 4.4**0.5)
    assert (row["relation"], row["global_relation"]) == ("as", "above")
    assert row["global_z"] == pytest.approx(6 / 1.1**0.5)


@pytest.mark.parametrize(("z", "said"), [(3.0, "as"), (3.01, "above"), (-3.01, "below")])
def test_three_deviations_are_not_enough_and_more_are(z: float, said: str) -> None:
    assert relation(0.6, 0.5, z) == said


def test_criterion_is_summed_up_by_medians_of_its_layers() -> None:
    layers = [
        {"scope": scope, "criterion": "l1", "cv": cv, "cv_null": cv / 2, "range_over_mean": 2 * cv,
         "tie_rate": cv}
        for scope, cv in (("layer", 1.0), ("layer", 2.0), ("layer", 9.0), ("global", 100.0))
    ]  # fmt: skip
    cuts = [
        {"scope": scope, "criterion": "l1", "gap_over_std": gap, "stability": held,
         "perturbed": "weights"}
        for scope, gap, held in (("layer", 1.0, 0.2), ("layer", 2.0, 0.3), ("layer", 6.0, 0.7),
                                 ("layer", None, None), ("global", 50.0, 1.0))
    ]  # fmt: skip
    (row,) = summed_up({"applicability": layers, "cuts": cuts})
    assert (row["rankings"], row["cv"], row["cv_null"], row["range_over_mean"]) == (3, 2, 1, 4)
    assert (row["tie_rate"], row["gap_over_std"]) == (4, 2)
    assert row["stability"] == pytest.approx(0.4)


def test_layer_has_collapsed_at_the_limit_itself() -> None:
    lost = np.array([[[0.9, 0.89]]])
    rows = collapse(("l1",), "mean", {"a": 10, "b": 100}, lost, (0.5,), 0.9)
    assert [(r["layer"], r["filters"], r["collapsed"]) for r in rows] == [
        ("a", 10, True), ("b", 100, False)
    ]  # fmt: skip


def test_rank_correlations_and_their_distance_stand_where_they_belong() -> None:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((2, 20))
    scores[1] += 2 * scores[0]
    gaussian = figures(generator.standard_normal((30, 2, 20)) + 1, (0.25, 0.5))
    ranking = Ranking(
        {"scope": "layer", "layer": "a"}, ("l1", "gm"), (0.25, 0.5), scores, scores[None],
        np.zeros((2, 2, 20)), {"l1": "weights", "gm": "weights"}, ("l1", "gm"), gaussian, 30,
    )  # fmt: skip
    (row,) = similarity(ranking)
    rho = stats.spearmanr(*scores).statistic
    assert row["spearman"] == pytest.approx(rho)
    assert row["kendall"] == pytest.approx(stats.kendalltau(*scores).statistic)
    mean, deviation = gaussian["fisher"][:, 0, 1]
    assert row["z"] == pytest.approx((np.arctanh(rho) - mean) / deviation)
    assert row["spearman_high"] == gaussian["spearman"][2, 0, 1]
    alone = Ranking(**{**vars(ranking), "plain": ("l1",)})
    (chance,) = similarity(alone)
    assert (chance["null"], chance["draws"], chance["spearman_null"]) == ("chance", None, 0)
    assert chance["z"] == pytest.approx(np.arctanh(rho) / by_chance(20, ())["fisher"][1])
    assert [r["jaccard_null"] for r in overlaps(ranking)] == list(gaussian["overlap"][0, :, 0, 1])
    spreads = applicability(alone)
    assert spreads[0]["cv_high"] == gaussian["cv"][2, 0]
    assert spreads[1]["cv_high"] is None
    assert [r["stability"] for r in cuts(ranking)] == [1.0] * 4


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
    assert (found["deviates"], found["near_zero"]) == (True, True)
    assert (found["span"], found["max"]) == (pytest.approx(3.9), 4.0)


def test_weights_far_from_zero_are_measured_in_their_deviations() -> None:
    weight = layer("gaussian", 1, (16, 8, 3, 3)) + 0.2
    found = battery(weight, 0)
    assert found["mean_over_std"] == pytest.approx(weight.mean() / weight.std())
    assert verdict({"skew": 0.1, "excess_kurtosis": 0.1, "p": 0.0}, *LIMITS) == "gaussian"
    assert verdict({"skew": 0.6, "excess_kurtosis": 0.1, "p": 0.5}, *LIMITS) == "gaussian"
    assert verdict({"skew": -0.6, "excess_kurtosis": 0.1, "p": 0.0}, *LIMITS) == "not gaussian"
