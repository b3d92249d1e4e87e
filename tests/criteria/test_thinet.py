"""ThiNet: what the next layer loses is what its samples say, and the least goes first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn
from zoo import FAMILIES, Odd, Overwrites, randomised

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.criteria.dependency import greedy
from fpgm.criteria.evidence import gather, look, missing
from fpgm.criteria.views import Contributions
from fpgm.criteria.views.contributions import Grams, sampled
from fpgm.criteria.views.readers import Reader, readers
from fpgm.errors import Error
from fpgm.graph.trace import trace

MATRIX = arrays("float64", (9, 6), elements=st.integers(-9, 9))
thinet = CRITERIA["thinet"]
NOBODY = torch.zeros(6, dtype=torch.bool)


def cost(x: np.ndarray, gone: tuple[int, ...]) -> float:
    """What the samples lose, sum_m (sum_{c in T} x_mc)^2."""
    return float((x[:, list(gone)].sum(1) ** 2).sum())


@given(MATRIX)
def test_the_order_is_that_of_the_paper_s_loop(x: np.ndarray) -> None:
    """By the samples themselves, a channel at a time."""
    expected: list[int] = []
    while len(expected) < 6:
        left = [c for c in range(6) if c not in expected]
        expected.append(min(left, key=lambda c: (cost(x, (*expected, c)), c)))
    gram = torch.from_numpy(x.T @ x)
    assert greedy(gram, NOBODY).tolist() == expected
    places = thinet(torch.ones(6, 1, 1, 1), contributions=gram)
    assert places.argsort().tolist() == expected


@given(MATRIX)
def test_what_goes_first_is_the_best_of_all_and_later_sets_are_no_better_than_the_best(
    x: np.ndarray,
) -> None:
    order = greedy(torch.from_numpy(x.T @ x), NOBODY).tolist()
    for size in range(1, 6):
        best = min(cost(x, gone) for gone in itertools.combinations(range(6), size))
        assert cost(x, tuple(order[:size])) >= best
        if size == 1:
            assert cost(x, tuple(order[:1])) == best


@given(arrays("float64", (9, 6), elements=st.floats(-1, 1)), st.sets(st.integers(0, 5)))
def test_the_gram_matrix_says_what_is_lost(x: np.ndarray, gone: set[int]) -> None:
    gram, t = x.T @ x, sorted(gone)
    lost = gram[np.ix_(t, t)].sum()
    assert lost == pytest.approx(cost(x, tuple(t)), abs=1e-12, rel=1e-12)


def test_filters_that_are_zero_have_gone_before_the_others_are_chosen() -> None:
    """Channel 2 makes up for what channel 0 says: without it 0 would go last."""
    x = torch.tensor([[3.0, 1.0, -3.0], [0.0, 1.0, 0.1]]).double()
    weight = torch.ones(3, 1, 1, 1)
    assert thinet(weight, contributions=x.T @ x).argsort().tolist() == [1, 2, 0]
    weight[2] = 0
    assert thinet(weight, contributions=x.T @ x).argsort().tolist() == [2, 0, 1]


class Plain(nn.Module):
    """One convolution that reads another, at every padding and stride."""

    def __init__(self, **how) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 8, 3, **how)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


HOWS = [
    {}, {"padding": 1}, {"padding": (0, 2), "stride": (2, 1)}, {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"}, {"dilation": 2, "padding": 2}, {"groups": 2},
]  # fmt: skip


def reader_of(model: nn.Module, name: str) -> Reader:
    return next(reader for reader in readers(trace(model)) if reader.name == name)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_contribution_is_what_the_next_layer_answers_to_that_channel_alone(how: dict) -> None:
    """At the positions that are drawn, whatever padding, stride and groups."""
    torch.manual_seed(0)
    model = Plain(**how).double()
    x = torch.randn(3, 6, 9, 7, dtype=torch.float64)
    reader = reader_of(model, "second")
    found = sampled(reader, x, 50, torch.arange(8), torch.Generator().manual_seed(1))
    assert found.shape == (150, 6)
    # The same draws.
    g = torch.Generator().manual_seed(1)
    outputs = torch.randint(8, (150,), generator=g)
    at = torch.rand(2, 150, generator=g, dtype=torch.float64)
    image = torch.arange(3).repeat_interleave(50)
    for channel in range(6):
        alone = torch.zeros_like(x)
        alone[:, channel] = x[:, channel]
        with torch.no_grad():
            y = model.second._conv_forward(alone, model.second.weight, None)
        rows, columns = (at[0] * y.shape[2]).long(), (at[1] * y.shape[3]).long()
        torch.testing.assert_close(found[:, channel], y[image, outputs, rows, columns])
    assert rows.unique().tolist() == list(range(y.shape[2]))  # the borders are drawn as well
    assert columns.unique().tolist() == list(range(y.shape[3]))


@pytest.mark.parametrize("network", ["odd", "overwrites", "mobilenet_v2", "shufflenet", "convnext"])
def test_what_is_sampled_is_what_the_layer_really_computes(network: str) -> None:
    """The mean square of the sampled outputs is near that of all, whoever writes the channels, and
    whatever has been overwritten in between."""
    torch.manual_seed(0)
    make = {"odd": Odd, "overwrites": Overwrites, **FAMILIES}[network]
    model = randomised(make(), 0)
    size = 24 if network in ("odd", "overwrites") else 64
    data = [(torch.randn(4, 3, size, size), torch.zeros(4, dtype=torch.long))]
    graph = trace(model, (3, size, size))
    collector = Grams(readers(graph), 400)
    assert look(model, graph, collector, data)
    outputs: dict[str, Tensor] = {}

    def hear(name: str, module: nn.Module, y: Tensor) -> None:
        outputs[name] = (y - bias(module, y)).detach()

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, x, y, name=name: hear(name, m, y))
    with torch.no_grad():
        model(data[0][0])
    grams = collector.values()
    checked = [name for name in grams if name in outputs]
    assert len(checked) >= 2
    for name in checked:
        expected = float(outputs[name].square().mean())
        assert float(grams[name].sum()) / 400 == pytest.approx(expected, rel=0.25), name


def bias(module: nn.Module, y: Tensor) -> Tensor:
    if module.bias is None:
        return torch.zeros(())
    return module.bias.view(1, -1, 1, 1) if isinstance(module, nn.Conv2d) else module.bias


def data(seed: int = 0, count: int = 5) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(count, 3, 12, 12, generator=g), torch.zeros(count).long())]


def test_runs_draw_the_same_positions_and_more_of_them_when_asked() -> None:
    model = randomised(fpgm.model("resnet20"), 0)
    torch.manual_seed(1)
    one = gather(model, ["thinet"], data())
    torch.manual_seed(2)
    assert all(torch.equal(one[n]["contributions"], v["contributions"])
               for n, v in gather(model, ["thinet"], data()).items())  # fmt: skip
    few = gather(model, ["thinet"], data(), positions=1)["layer3.2.conv1"]["contributions"]
    assert torch.linalg.matrix_rank(few) <= 5 < 40
    many = one["layer3.2.conv1"]["contributions"]
    assert torch.linalg.matrix_rank(many) > 5


def test_several_readers_are_added_and_a_part_of_the_filters_is_a_part_of_both_axes() -> None:
    model = randomised(fpgm.model("resnet20"), 0)
    graph = trace(model)
    collector = Grams(readers(graph), 10)
    look(model, graph, collector, data())
    grams = collector.values()
    found = gather(model, ["thinet"], data())
    inner = found["layer1.0.conv1"]["contributions"]
    torch.testing.assert_close(inner, grams["layer1.0.conv2"])
    into = [n for n, r in ((r.name, r) for r in collector.readers.values())
            if any(("layer3.1.conv2", 0) in w for w in r.writers)]  # fmt: skip
    assert into == ["layer3.2.conv1", "fc"]
    torch.testing.assert_close(
        found["layer3.1.conv2"]["contributions"], grams["layer3.2.conv1"] + grams["fc"]
    )
    some = torch.tensor([5, 1, 3])
    part = Contributions().part_of(inner, some)
    assert part.tolist() == [[float(inner[a, b]) for b in some] for a in some]


def test_a_channel_that_says_nothing_goes_first() -> None:
    torch.manual_seed(0)
    model = Plain()
    with torch.no_grad():
        model.first.weight[4] = -1e-3  # a live filter, behind whose ReLU nothing comes
        model.first.bias[4] = -10
    gram = gather(model, ["thinet"], data())["first"]["contributions"]
    assert not gram[4].any()
    assert int(thinet(model.first.weight, contributions=gram).argmin()) == 4


def test_layers_that_nobody_reads_are_named() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).mean((2, 3))

    assert missing(Last(), "thinet", ["a", "b"]) == ["b"]
    with pytest.raises(Error, match=r"needs a layer that reads its channels behind .* behind b;"):
        fpgm.evidence.require(Last(), "thinet", ["a", "b"])


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=10)
def test_as_many_go_as_are_asked_for_and_one_ranking_is_refused(seed: int) -> None:
    model = randomised(fpgm.model("resnet20"), seed)
    found = gather(model, ["thinet"], data(seed))
    keep = fpgm.select(model, "thinet", 0.5, evidence=found)
    assert all(len(kept) == len(model.get_submodule(n).weight) // 2 for n, kept in keep.items())
    with pytest.raises(Error, match="is an order of pruning"):
        fpgm.select(model, "thinet", 0.5, scope="global", evidence=found)
