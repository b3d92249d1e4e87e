"""R^2 is that of least squares, whatever the order, the scale or the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpgm.figures.replaceable import Products, explained, products

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def gathered(maps: Tensor, batch: int = 3) -> Tensor:
    sums = Products()
    for part in maps.split(batch):
        sums.add(part)
    return sums.covariance()


def some_maps(seed: int, n: int = 7) -> Tensor:
    """(8, n, 4, 5) that lie near a space of n - 2 dimensions."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, n - 2, generator=g, dtype=torch.float64)
    base = torch.randn(8, n - 2, 4, 5, generator=g, dtype=torch.float64)
    noise = 0.3 * torch.randn(8, n, 4, 5, generator=g, dtype=torch.float64)
    return torch.einsum("nk,bkhw->bnhw", mixed, base) + noise + 3


def by_numpy(columns: np.ndarray, target: np.ndarray, about: float) -> float:
    """1 - residual / total of numpy's least squares."""
    fit = columns @ np.linalg.lstsq(columns, target, rcond=None)[0]
    return 1 - ((target - fit) ** 2).sum() / ((target - about) ** 2).sum()


@few
@given(seed=seeds, gone=st.integers(1, 5))
def test_maps_are_regressed_with_an_intercept_over_pixels(seed: int, gone: int) -> None:
    maps = some_maps(seed)
    pruned = torch.randperm(7, generator=torch.Generator().manual_seed(seed))[:gone].sort().values
    found = explained(gathered(maps), pruned)
    points = maps.movedim(1, -1).flatten(0, -2).numpy()
    kept = np.delete(points, pruned.numpy(), axis=1)
    columns = np.column_stack((np.ones(len(points)), kept))
    for value, place in zip(found, pruned, strict=True):
        target = points[:, place]
        assert float(value) == pytest.approx(by_numpy(columns, target, target.mean()), abs=1e-9)


@few
@given(seed=seeds)
def test_filters_are_regressed_without_an_intercept_over_weights(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 3, 3, 3, generator=g, dtype=torch.float64) + 0.5
    filters = weight.flatten(1).numpy()
    found = explained(products(weight), torch.tensor([1, 4]))
    kept = filters[[0, 2, 3, 5]].T
    for value, place in zip(found, (1, 4), strict=True):
        assert float(value) == pytest.approx(by_numpy(kept, filters[place], 0.0), abs=1e-9)


@few
@given(seed=seeds)
def test_order_scale_and_batches_change_nothing(seed: int) -> None:
    maps = some_maps(seed)
    g = torch.Generator().manual_seed(seed)
    pruned = torch.tensor([0, 3])
    expected = explained(gathered(maps), pruned)
    order = torch.randperm(7, generator=g)
    places = torch.argsort(order)[pruned]
    torch.testing.assert_close(explained(gathered(maps[:, order]), places), expected)
    # What a BatchNorm does, with scales as far apart as trained ones are.
    scale = torch.randn(7, generator=g, dtype=torch.float64).mul(2).exp().view(-1, 1, 1)
    shift = 10 * torch.randn(7, 1, 1, generator=g, dtype=torch.float64)
    torch.testing.assert_close(explained(gathered(maps * scale + shift), pruned), expected)
    torch.testing.assert_close(explained(gathered(maps, 8), pruned), expected)


@few
@given(seed=seeds, factor=st.sampled_from([-2.0, 1e-3, 1.0, 500.0]))
def test_a_duplicate_has_one(seed: int, factor: float) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 2, 3, 3, generator=g)
    weight[3] = factor * weight[1]
    assert float(explained(products(weight), torch.tensor([3]))) == pytest.approx(1, abs=1e-9)
    maps = some_maps(seed)
    maps[:, 5] = factor * maps[:, 2] + 1
    assert float(explained(gathered(maps), torch.tensor([5]))) == pytest.approx(1, abs=1e-9)
    assert float(explained(gathered(maps), torch.tensor([6]))) < 1 - 1e-6


def test_orthogonal_filters_have_none_whatever_their_mean() -> None:
    weight = torch.eye(6, 18).view(6, 2, 3, 3)  # the means are not 0
    for place in range(6):
        assert float(explained(products(weight), torch.tensor([place]))) == 0


def test_uncorrelated_maps_have_none_though_neither_has_a_mean_of_zero() -> None:
    wave = torch.arange(12) * 2 * torch.pi / 12
    maps = torch.stack((wave.sin(), wave.cos(), (2 * wave).sin())).view(1, 3, 3, 4) + 5
    assert float(explained(gathered(maps), torch.tensor([1]))) == pytest.approx(0, abs=1e-12)


def test_two_that_are_pruned_together_do_not_explain_each_other() -> None:
    weight = torch.eye(4, 9).view(4, 1, 3, 3)
    weight[3] = weight[2]
    alone = explained(products(weight), torch.tensor([3]))
    together = explained(products(weight), torch.tensor([2, 3]))
    assert (float(alone), together.tolist()) == (pytest.approx(1), [0, 0])


def test_gaussian_filters_have_the_share_of_dimensions_that_is_kept() -> None:
    """E[R^2] = K / d of iid Gaussian filters of d weights, K kept."""
    g = torch.Generator().manual_seed(0)
    values = [
        explained(products(torch.randn(40, 8, 3, 3, generator=g)), torch.arange(4)).mean()
        for _ in range(60)
    ]
    assert float(torch.stack(values).mean()) == pytest.approx(36 / 72, abs=0.01)


def test_a_constant_map_is_all_intercept_and_explains_nothing() -> None:
    maps = some_maps(0).float()
    expected = explained(gathered(maps[:, [0, 1, 2, 3, 4]]), torch.tensor([0]))
    maps[:, 5:] = 7.3
    assert float(explained(gathered(maps), torch.tensor([5]))) == 1
    torch.testing.assert_close(explained(gathered(maps), torch.tensor([0])), expected)


def test_a_map_that_hardly_varies_beside_its_mean_keeps_its_digits() -> None:
    maps = some_maps(1)
    expected = explained(gathered(maps), torch.tensor([2]))
    torch.testing.assert_close(
        explained(gathered(maps + 1e7), torch.tensor([2])), expected, rtol=1e-6, atol=1e-6
    )
