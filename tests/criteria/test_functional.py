"""Filters that are for the same: which images they respond to, and which of them goes first."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import randomised

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.criteria.evidence import gather
from fpgm.criteria.functionality import kmeans
from fpgm.criteria.views.preferred import climbed, up_to
from fpgm.errors import Error
from fpgm.graph.trace import trace

IMAGE = (3, 10, 10)
functional = CRITERIA["functional"]
seeds = st.integers(0, 2**31)


def images(model: nn.Module, layer: str, **options: int) -> Tensor:
    batch = [(torch.randn(4, *IMAGE), torch.zeros(4, dtype=torch.long))]
    found = gather(model, ["functional"], batch, [layer], IMAGE, **options)
    return found[layer]["preferred"]


def responses(model: nn.Module, layer: str, pictures: Tensor) -> Tensor:
    """What each filter says on average of the image of its own. (N,)"""
    heard: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda m, x, y: heard.append(y))
    with hook, torch.no_grad():
        model(pictures.float().view(-1, *IMAGE))
    return heard[0].mean((2, 3)).diagonal()


@pytest.mark.parametrize("layer", ["conv1", "layer2.0.conv1", "layer3.2.conv2"])
def test_a_filter_responds_more_to_its_image_with_every_step(layer: str) -> None:
    model = randomised(fpgm.model("resnet20"), 0)
    climbing = [responses(model, layer, images(model, layer, steps=n)) for n in (1, 4, 12)]
    assert (climbing[1] > climbing[0]).double().mean() > 0.95
    assert (climbing[2] > climbing[1]).double().mean() > 0.95


def as_far_as(model: nn.Module, layer: str) -> nn.Module:
    graph = trace(model)
    return up_to(graph, next(node for node, name in graph.writers() if name == layer)).eval()


def test_the_first_layer_prefers_what_its_weights_say() -> None:
    """The mean of a linear map has one gradient everywhere: with a kernel of one pixel, its weight
    at each pixel."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.point(x)).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Point()
    one, many = (images(model, "point", steps=n).view(6, *IMAGE) for n in (1, 50))
    moved = (many - one).mean((2, 3))
    weight = model.point.weight.detach().flatten(1).double()
    torch.testing.assert_close(
        nn.functional.normalize(moved), nn.functional.normalize(weight), rtol=1e-4, atol=1e-4
    )


def test_images_come_out_the_same_and_chance_is_left_alone() -> None:
    model = randomised(fpgm.model("resnet20"), 0).train()
    torch.manual_seed(1)
    one = images(model, "layer1.0.conv1")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = gather(model, ["functional"], [(torch.ones(2, *IMAGE), torch.zeros(2).long())],
                   ["layer1.0.conv1"], IMAGE)  # fmt: skip
    assert torch.equal(found["layer1.0.conv1"]["preferred"], one)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def grouped(seed: int, sizes: list[int]) -> tuple[Tensor, list[int]]:
    """Points around directions that are far from each other, and which is whose."""
    g = torch.Generator().manual_seed(seed)
    owners = [i for i, size in enumerate(sizes) for _ in range(size)]
    noise = torch.randn(len(owners), 8, generator=g, dtype=torch.float64)
    return torch.eye(8).double()[owners] + 0.01 * noise, owners


@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=5), st.randoms())
def test_clusters_are_found_whatever_the_points_order(seed: int, sizes: list[int], chance) -> None:
    points, owners = grouped(seed, sizes)
    order = list(range(len(owners)))
    chance.shuffle(order)
    found = kmeans(points[order], len(sizes)).tolist()
    for (i, a), (j, b) in itertools.combinations(enumerate(found), 2):
        assert (a == b) == (owners[order[i]] == owners[order[j]])


@given(seeds, st.integers(1, 5))
def test_clusters_are_no_worse_than_where_they_began_and_at_rest(seed: int, count: int) -> None:
    """Every point lies with the nearest mean: Lloyd's own condition."""
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(12, 3, generator=g, dtype=torch.float64)
    found = kmeans(points, count)
    means = {int(k): points[found == k].mean(0) for k in found.unique()}
    for point, cluster in zip(points, found.tolist(), strict=True):
        nearest = min(means, key=lambda k: float((point - means[k]).norm()))
        assert (point - means[cluster]).norm() <= (point - means[nearest]).norm() + 1e-12


@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_the_least_of_large_clusters_go_first_and_the_best_of_each_last(
    seed: int, sizes: list[int]
) -> None:
    points, owners = grouped(seed, sizes)
    g = torch.Generator().manual_seed(seed)
    useful = torch.rand(len(owners), generator=g, dtype=torch.float64)
    places = functional(
        torch.ones(len(owners), 1, 1, 1), preferred=points, sensitivity=useful,
        clusters=len(sizes) / len(owners),
    )  # fmt: skip

    def better(i: int) -> int:
        return sum(o == owners[i] and useful[j] > useful[i] for j, o in enumerate(owners))

    expected = sorted(range(len(owners)), key=lambda i: (-better(i), float(useful[i])))
    assert places.argsort().tolist() == expected
    last = expected[len(owners) - len(sizes) :]
    assert sorted(owners[i] for i in last) == list(range(len(sizes)))  # one of each


def test_of_two_equal_filters_one_goes_before_the_best_of_its_kind() -> None:
    points = torch.tensor([[1.0, 0], [1, 0], [0, 1]]).double()
    places = functional(
        torch.ones(3, 1, 1, 1), preferred=points, sensitivity=torch.tensor([5, 4, 0.1]),
        clusters=0.6,
    )  # fmt: skip
    assert places.argsort().tolist() == [1, 2, 0]  # and not the least useful, which is alone


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"clusters": 0}, "criterion.clusters=0: must be above 0 and at most 1"),
        ({"clusters": 1.5}, "criterion.clusters=1.5: must be above 0 and at most 1"),
        ({"steps": 0}, "criterion.steps=0: must be at least 1"),
        ({"pixels": 0}, "criterion.pixels=0: must be at least 1"),
    ],
)
def test_options_out_of_range_are_named(options: dict, line: str) -> None:
    with pytest.raises(Error) as caught:
        fpgm.select(fpgm.model("resnet20"), "functional", evidence={}, **options)
    assert str(caught.value).startswith(line)


def test_images_are_no_larger_than_asked_and_ones_that_are_too_small_are_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    assert images(model, "0", pixels=6).shape == (4, 3 * 6 * 6)
    assert images(model, "0", pixels=99).shape == (4, 3 * 10 * 10)
    with pytest.raises(Error, match=r"^pixels=4: 3 cannot .*; criterion.pixels=8$") as caught:
        images(model, "3", pixels=4)
    assert "\n" not in str(caught.value)


def test_without_the_images_size_it_is_asked_for() -> None:
    batch = [(torch.randn(2, *IMAGE), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(Error, match=r"^image=None: .*give image=\(C, H, W\)$"):
        gather(fpgm.model("resnet20"), ["functional"], batch)


def test_a_network_that_was_never_trained_has_images_of_each_filter_alone() -> None:
    """And not of the batch of other filters' images, as its BatchNorm would take them."""
    model, layer = fpgm.model("resnet20").eval(), "layer1.0.conv2"
    together = images(model, layer, steps=3)
    noise = torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = climbed(as_far_as(model, layer), 0.1 * noise.float(), torch.tensor([5]), 3)
    torch.testing.assert_close(alone.flatten().double(), together[5], rtol=1e-3, atol=1e-4)
    nothing = climbed(as_far_as(model, layer), torch.zeros(1, *IMAGE), torch.arange(2), 3)
    assert not nothing.any()  # steps are as long as the start is
