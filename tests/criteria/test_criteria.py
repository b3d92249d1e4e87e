"""What a user loses when one of these fails: the paper's scores."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.criteria.geometric_median import DISTANCES, geometric_median, shares
from fpgm.errors import Error

fermat, gm, l1, l2, lp, mix, random = (
    CRITERIA[name] for name in ("fermat", "gm", "l1", "l2", "lp", "mix", "random")
)

POINTS = torch.tensor([[0, 0], [4, 0], [0, 3], [1, 1], [10, 10]], dtype=torch.float64)


def order(scores: torch.Tensor) -> list[int]:
    return torch.argsort(scores, stable=True).tolist()


def filters(seed: int, n: int = 20, shape: tuple[int, ...] = (3, 3, 3)) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(2, 24), st.integers(1, 40)),
    elements=st.floats(-100, 100, width=32),
)
seeds = st.integers(0, 2**31)


def test_gm_and_l2_give_the_scores_of_the_worked_example() -> None:
    expected = [22.556349, 23.824181, 22.442624, 19.540481, 50.738517]
    assert gm(POINTS).tolist() == pytest.approx(expected, abs=5e-7)
    assert order(gm(POINTS)) == [3, 2, 0, 1, 4]
    assert order(l2(POINTS)) == [0, 3, 2, 1, 4]
    assert geometric_median(POINTS).tolist() == [1, 1]
    assert fermat(POINTS).tolist() == pytest.approx([2**0.5, 10**0.5, 5**0.5, 0, 162**0.5])


def test_gm_keeps_the_sign_of_one_dimensional_filters() -> None:
    weight = torch.tensor([1.0, -1.0, 3.0, 0.2], dtype=torch.float64).view(4, 1, 1, 1)
    assert gm(weight).tolist() == pytest.approx([4.8, 7.2, 8.8, 4.8], abs=1e-12)


@given(matrices)
@settings(deadline=None)
def test_gm_equals_scipy_on_any_filters(points: np.ndarray) -> None:
    expected = cdist(points, points).sum(0)
    got = gm(torch.from_numpy(points)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-30)


@given(seeds, st.sampled_from([1e-7, 1e-5, 1e-2]))
@settings(deadline=None, max_examples=25)
def test_gm_keeps_its_digits_for_near_identical_filters(seed: int, spread: float) -> None:
    base = filters(seed, 1)
    weight = base + spread * filters(seed + 1, 300)  # more than one group of rows
    weight[7] *= 1000  # and one outlier, which moves the mean away
    vectors = weight.flatten(1).double().numpy()
    np.testing.assert_allclose(gm(weight).numpy(), cdist(vectors, vectors).sum(0), rtol=1e-6)


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_gm_sees_only_how_filters_lie_to_each_other(seed: int) -> None:
    weight = filters(seed).flatten(1).double()
    scores = gm(weight)
    shuffle = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(filters(seed + 1, 27).flatten(1).double())[0]
    torch.testing.assert_close(gm(weight[shuffle]), scores[shuffle])
    torch.testing.assert_close(gm(weight @ rotation), scores)
    torch.testing.assert_close(gm(weight + 5), scores)  # no norm has this one
    torch.testing.assert_close(gm(weight * 2), scores * 2)
    assert not torch.allclose(l2(weight + 5), l2(weight))


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_l1_and_cosine_distances_are_what_scipy_computes(seed: int) -> None:
    weight = filters(seed)
    vectors = weight.flatten(1).double().numpy()
    for name, metric in (("l1", "cityblock"), ("cosine", "cosine")):
        np.testing.assert_allclose(
            gm(weight, distance=name).numpy(), cdist(vectors, vectors, metric).sum(0), rtol=1e-9
        )


def test_cosine_distance_of_zero_filters_is_defined() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert gm(weight, distance="cosine").tolist() == [2, 2, 3, 3]


@given(matrices)
@settings(deadline=None, max_examples=60)
def test_geometric_median_has_no_better_point(points: np.ndarray) -> None:
    data = points.astype(np.float64)

    def total(x: np.ndarray) -> float:
        return float(np.linalg.norm(data - x, axis=1).sum())

    median = geometric_median(torch.from_numpy(data)).numpy()
    reached = min(minimize(total, start, method="Powell").fun for start in (median, data.mean(0)))
    assert total(median) <= reached * (1 + 1e-5) + 1e-9
    assert total(median) <= min(map(total, data)) * (1 + 1e-9) + 1e-12


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_mix_takes_norm_first_and_then_distances_among_the_survivors(seed: int) -> None:
    weight = filters(seed, 16)
    by_norm = order(l2(weight))[:2]
    rest = [j for j in range(16) if j not in by_norm]
    vectors = weight.flatten(1).double().numpy()[rest]
    by_distance = [rest[i] for i in np.argsort(cdist(vectors, vectors).sum(0), kind="stable")]
    assert order(mix(weight, rate=0.5)) == by_norm + by_distance
    assert order(mix(weight, rate=0.5, norm_share=0.0)) == order(gm(weight))
    assert order(mix(weight, rate=0.5, norm_share=1.0))[:8] == order(l2(weight))[:8]


def test_mix_prunes_the_floors_of_both_shares_as_published() -> None:
    assert shares(16, 0.4) == (1, 4)  # 5, where the other criteria prune 6
    assert shares(64, 0.4) == (6, 19)
    assert shares(100, 0.29, 1.0) == (29, 0)  # not 28, by rounding
    assert shares(100, 0.29, 0.0) == (0, 29)
    assert shares(30, 0.3, 1 / 3) == (3, 6)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 4, 1))
    network = torch.nn.Sequential(model, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network.append(torch.nn.Linear(4, 2))
    keep = fpgm.select(network, "mix", 0.4)
    gone = sorted(set(range(16)) - set(keep["0.0"].tolist()))
    assert gone == sorted(order(mix(model[0].weight, rate=0.4))[:5])


powers = st.sampled_from([1.0, 2.0, np.inf]) | st.floats(1, 40)


@given(matrices, powers)
@settings(deadline=None)
def test_lp_is_the_norm_that_numpy_computes(points: np.ndarray, p: float) -> None:
    # Far from the ends of float64, where numpy's powers overflow.
    points = np.where(np.abs(points) < 1e-5, 0, points).astype(np.float64)
    expected = np.linalg.norm(points, ord=p, axis=1)
    np.testing.assert_allclose(lp(torch.from_numpy(points), p=p).numpy(), expected, rtol=1e-12)


@given(seeds, powers)
@settings(deadline=None, max_examples=30)
def test_lp_is_a_norm_of_the_filter_and_of_nothing_else(seed: int, p: float) -> None:
    weight = filters(seed)
    scores = lp(weight, p=p)
    shuffled = weight.flatten(1)[:, torch.randperm(27, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(lp(shuffled, p=p), scores, rtol=1e-12, atol=0)
    torch.testing.assert_close(lp(-3 * weight, p=p), 3 * scores, rtol=1e-6, atol=0)
    assert (lp(weight + weight.flip(0), p=p) <= (scores + scores.flip(0)) * (1 + 1e-6)).all()
    torch.testing.assert_close(lp(weight, p=1), l1(weight), rtol=1e-12, atol=0)
    torch.testing.assert_close(lp(weight, p=2), l2(weight), rtol=1e-12, atol=0)
    assert torch.equal(lp(weight), weight.flatten(1).abs().amax(1).double())


@pytest.mark.parametrize("p", [400, 1e6, 1e308])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_lp_of_a_large_p_is_neither_nothing_nor_infinite(p: float, size: float) -> None:
    weight = torch.tensor([[0.1, -0.1, 0.05], [0.0, 0.0, 0.0], [0.3, 0.0, 0.1]]) * size
    nearly = weight.abs().amax(1).double() * torch.tensor([2 ** (1 / p), 1, 1], dtype=float)
    torch.testing.assert_close(lp(weight, p=p), nearly, rtol=1e-12, atol=0)


def test_random_is_seeded_and_differs_between_seeds() -> None:
    weight = filters(0, 64)
    assert torch.equal(random(weight, seed=1), random(weight, seed=1))
    assert not torch.equal(random(weight, seed=1), random(weight, seed=2))


@pytest.mark.parametrize(
    ("n", "d", "l1_l2", "l2_gm"),
    [(16, 144, 0.904, 0.902), (64, 576, 0.921, 0.978), (256, 1152, 0.927, 0.995)],
)
def test_criteria_rank_gaussian_filters_as_their_null_says(
    n: int, d: int, l1_l2: float, l2_gm: float
) -> None:
    """Expected Spearman were measured over 2000, 400 and 60 draws (standard errors <= .0013)."""
    draws = max(20, 3000 // n)
    pairs = np.empty((draws, 3))
    for i in range(draws):
        w = filters(10_000 + i, n, (d, 1, 1))
        a, b, c, f = (s(w).numpy() for s in (l1, l2, gm, fermat))
        pairs[i] = spearmanr(a, b)[0], spearmanr(b, c)[0], spearmanr(c, f)[0]
    mean, error = pairs.mean(0), pairs.std(0) / draws**0.5
    assert abs(mean[0] - l1_l2) < 4 * error[0] + 0.002
    assert abs(mean[1] - l2_gm) < 4 * error[1] + 0.002
    assert mean[2] > 0.995


WEIGHT_ONLY = [name for name, c in CRITERIA.items() if not c.views]  # others: test_evidence.py


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_every_criterion_scores_every_filter_without_touching_the_weight(name: str) -> None:
    weight = filters(1).requires_grad_()
    before = weight.detach().clone()
    scores = CRITERIA[name](weight, **({"rate": 0.2} if name == "mix" else {}))
    assert scores.shape == (20,)
    assert torch.isfinite(scores).all()
    assert not scores.requires_grad
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("gm", {"distance": "l3"}, "criterion.distance=l3: choose one of " + ", ".join(DISTANCES)),
        ("gm", {"distanze": "l2"}, "criterion.distanze: no such key, did you mean distance?"),
        ("l1", {"distance": "l2"}, "criterion.distance: no such key, there are none here"),
        ("mix", {"norm_share": 1.5}, "criterion.norm_share=1.5: must be at least 0 and at most 1"),
        ("mix", {"norm_share": "a"}, "criterion.norm_share=a: must be a number, for example crit"),
        ("gm", {"distance": None}, "criterion.distance=null: choose one of l2"),
        ("lp", {"p": 0.5}, "criterion.p=0.5: must be at least 1, for example criterion.p=inf"),
        ("lp", {"p": float("nan")}, "criterion.p=nan: must be at least 1"),
        ("lp", {"p": ".inf"}, "criterion.p=.inf: must be a number, for example criterion.p=inf"),
    ],
)
def test_an_option_that_a_criterion_does_not_take_is_named(
    name: str, options: dict, line: str
) -> None:
    with pytest.raises(Error) as caught:
        fpgm.select(fpgm.model("resnet20"), name, **options)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_gm_of_a_resnet50_is_five_times_faster_than_scipy() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet50()
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Conv2d)]

    def scipy_route(weight: torch.Tensor) -> np.ndarray:
        vectors = weight.flatten(1).numpy()
        return cdist(vectors, vectors).sum(0)

    def timed(score) -> tuple[float, list]:
        start = time.perf_counter()
        scores = [score(weight) for weight in weights]
        return time.perf_counter() - start, scores

    timed(gm)  # warm up the matrix library's threads
    rounds = [(timed(gm), timed(scipy_route)) for _ in range(3)]
    (_, ours), (_, theirs) = rounds[0]
    assert max(np.max(np.abs(a.numpy() - b) / b) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    ratio = np.median([b[0] / a[0] for a, b in rounds])
    print(f"gm over ResNet-50: {ratio:.1f} times faster than scipy")
    assert ratio > 5
