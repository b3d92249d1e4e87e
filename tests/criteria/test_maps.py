"""What a user loses when one of these fails: criteria of feature maps, by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from zoo import randomised

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.criteria.chip import nuclear_losses
from fpgm.criteria.evidence import gather, missing
from fpgm.errors import Error

seeds = st.integers(0, 2**31)
bn_beta, chip, entropy = (CRITERIA[name] for name in ("bn_beta", "chip", "entropy"))


def rows(*values: list[float]) -> Tensor:
    """One image's maps, a row of pixels for each filter: (1, N, 1, M)."""
    return torch.tensor([values], dtype=torch.float64)[:, :, None]


def by_definition(maps: Tensor) -> np.ndarray:
    """A decomposition for every image and filter."""
    found = []
    for image in maps.double().flatten(2).numpy():
        whole = np.linalg.norm(image, "nuc")
        others = [np.delete(image, i, 0) for i in range(len(image))]
        found.append([whole - (np.linalg.norm(a, "nuc") if len(a) else 0) for a in others])
    return np.array(found)


@pytest.mark.parametrize(
    ("maps", "losses"),
    [
        (rows([1, 0, 0], [0, 2, 0], [0, 0, 3]), [1, 2, 3]),
        (rows([3, 4], [3, 4]), [2.0711] * 2),
        (rows([3, 4], [3, 4], [3, 4]), [1.5892] * 3),
        (rows([0, 0], [0, 0]), [0, 0]),
    ],
)
def test_chip_gives_the_worked_examples(maps: Tensor, losses: list[float]) -> None:
    assert nuclear_losses(maps)[0].tolist() == pytest.approx(losses, abs=5e-5)
    turned = nuclear_losses(
        maps @ torch.linalg.qr(torch.randn(maps.shape[3], maps.shape[3]).double())[0]
    )
    assert turned[0].tolist() == pytest.approx(losses, abs=5e-5)


@given(
    seeds,
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from(["any", "rectified", "doubled", "silent", "small"]),
    st.sampled_from([1e-6, 1.0, 1e6]),
)
@example(1, (7, 2, 3), "small", 1e-6)  # of A'A alone 1e-5 of the largest singular value were lost
@settings(deadline=None, max_examples=60)
def test_chip_is_the_nuclear_norm_that_a_filter_takes_along(
    seed: int, shape: tuple[int, int, int], kind: str, scale: float
) -> None:
    """More filters than pixels and fewer, equal ones, silent ones, and ones that hardly speak."""
    g = torch.Generator().manual_seed(seed)
    maps = scale * torch.randn(3, *shape, generator=g, dtype=torch.float64)
    maps = maps if kind == "any" else maps.relu()
    if kind == "doubled":
        maps = torch.cat((maps, maps[:, :2]), 1)
    elif kind == "silent":
        maps[:, :2] = 0
    elif kind == "small":
        maps *= torch.rand(1, shape[0], 1, 1, generator=g).pow(9)
    expected = by_definition(maps)
    got = nuclear_losses(maps).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=5e-7 * float(maps.norm()))


def test_chip_of_many_images_is_that_of_each_and_not_finite_maps_spoil_their_own_alone() -> None:
    maps = torch.randn(5, 40, 30, 30, generator=torch.Generator().manual_seed(0)).relu()
    alone = torch.cat([nuclear_losses(image[None]) for image in maps])
    torch.testing.assert_close(nuclear_losses(maps.repeat(30, 1, 1, 1)), alone.repeat(30, 1))
    maps[3, 7, 2, 2] = torch.inf
    losses = nuclear_losses(maps)
    assert losses[3].isnan().all()
    torch.testing.assert_close(losses[[0, 1, 2, 4]], alone[[0, 1, 2, 4]])


def test_chip_of_a_filter_that_alone_sees_a_pixel_is_right_to_ten_digits() -> None:
    maps = torch.rand(30, 7, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[:, 1:, :, 2] = 0  # of more filters than pixels: without the first a direction is lost
    np.testing.assert_allclose(nuclear_losses(maps), by_definition(maps), rtol=1e-10)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def maps(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).mean((2, 3)))


@given(seeds, st.integers(1, 39), st.integers(2, 30))
@settings(deadline=None, max_examples=15)
def test_chip_and_entropy_are_of_all_images_however_batched(seed: int, cut: int, bins: int) -> None:
    torch.manual_seed(seed)
    model = randomised(Small(), seed, torch.float64)
    x, y = torch.randn(40, 3, 6, 6, dtype=torch.float64), torch.randint(4, (40,))
    batches = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    found = gather(model, ["chip", "entropy"], batches)["conv"]
    with torch.no_grad():
        maps = model.maps(x)
    weight = model.conv.weight
    losses = chip(weight, losses=found["losses"])
    np.testing.assert_allclose(losses, by_definition(maps).mean(0), rtol=1e-6, atol=1e-9)
    expected = []
    for values in maps.mean((2, 3)).T.numpy():
        counts, _ = np.histogram(values, bins)  # over their own range
        expected.append(stats.entropy(counts) if np.ptp(values) > 0 else 0)
    scores = entropy(weight, averages=found["averages"], bins=bins)
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)


def test_a_filter_that_says_the_same_of_every_image_goes_first() -> None:
    weight = torch.ones(4, 1, 1, 1)
    averages = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)).double()
    averages[1] = 0.7 * (1 + 1e-9 * averages[0])  # but for rounding
    averages[2] = 0
    scores = entropy(weight, averages=averages)
    assert scores[1] == scores[2] == 0
    assert min(scores[0], scores[3]) > 2
    evenly = torch.arange(40.0).expand(4, 40)
    assert entropy(weight, averages=evenly).tolist() == pytest.approx([np.log(20)] * 4)
    assert entropy(weight, averages=evenly, bins=4).tolist() == pytest.approx([np.log(4)] * 4)


def test_entropys_bins_are_at_least_two() -> None:
    with pytest.raises(Error, match=r"^criterion.bins=1: must be at least 2, for example"):
        fpgm.select(Small(), "entropy", bins=1)


def test_bn_beta_needs_no_data_and_is_the_shift_of_the_own_batchnorm() -> None:
    model = randomised(Small(), 0)
    scores = bn_beta(model.conv.weight, **gather(model, ["bn_beta"])["conv"])
    assert torch.equal(scores, model.norm.bias.detach().abs().double())
    assert fpgm.select(model, "bn_beta", 0.5)["conv"].tolist() == sorted(
        scores.argsort()[3:].tolist()
    )


@pytest.mark.parametrize(("name", "part"), [("bn_beta", "BatchNorm"), ("chip", "ReLU")])
def test_layers_that_lack_what_is_looked_at_are_named(name: str, part: str) -> None:
    model = Small()
    model.norm = nn.Identity()
    model.maps = lambda x: torch.tanh(model.norm(model.conv(x)))  # type: ignore[method-assign]
    assert missing(model, name) == ["conv"]
    with pytest.raises(Error, match=f"criterion={name}: needs a {part} behind each"):
        fpgm.select(model, name, 0.5)
