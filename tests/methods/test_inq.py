"""INQ: every weight that is shipped is 0 or a power of two, and what is rounded stays so."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import compose
from hypothesis import given
from hypothesis import strategies as st
from tasks import Noise, few, steps, whole
from torch import Tensor, nn
from zoo import randomised

import fpgm
from fpgm.errors import Error
from fpgm.methods.beside.inq import INQ, largest, power_of_two, top_exponent
from fpgm.training.asked import asked

__all__ = ["few"]  # a fixture


def published(values: list[float], bits: int) -> list[float]:
    """The paper's rule, value by value, in Python's own numbers."""
    top = math.floor(math.log2(4 * max(map(abs, values)) / 3))
    least = top + 1 - 2 ** (bits - 2)
    levels = [0.0, *(2.0**n for n in range(least, top + 1))]
    found = []
    for value in values:
        fitting = [
            beta
            for alpha, beta in pairwise(levels)
            if (alpha + beta) / 2 <= abs(value) < 3 * beta / 2
        ]
        found.append(math.copysign(fitting[-1] if fitting else 0.0, value))
    return found


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(3, [1, -0.5, 0, 0, 0]), (5, [1, -0.5, 0.25, 0.0625, -0.03125])],
)
def test_the_published_example(bits: int, expected: list[float]) -> None:
    weight = torch.tensor([0.9, -0.4, 0.2, 0.06, -0.03])
    assert power_of_two(weight, top_exponent(weight), bits).tolist() == expected


# Thirty-seconds of powers of two, so that the bounds between levels are among them.
eighths = st.builds(lambda n, e: n / 32 * 2.0**e, st.integers(-64, 64), st.integers(-12, 6))


@given(st.lists(eighths, min_size=1, max_size=20).filter(any), st.integers(2, 8))
def test_values_are_those_of_the_paper_s_rule_and_rounding_again_changes_nothing(
    values: list[float], bits: int
) -> None:
    weight = torch.tensor(values)
    top = top_exponent(weight)
    once = power_of_two(weight, top, bits)
    assert once.tolist() == published(values, bits)
    assert torch.equal(power_of_two(once, top, bits), once)
    assert len(once.abs().unique()) <= 2 ** (bits - 2) + 1


@given(st.lists(eighths, min_size=1, max_size=20), st.floats(0.01, 0.99), st.randoms())
def test_the_largest_are_rounded_first_and_none_again_let_go(
    values: list[float], share: float, random
) -> None:
    weight = torch.tensor(values)
    before = torch.tensor([random.random() < 0.3 for _ in values])
    which = largest(weight, before, share)
    assert (which | ~before).all()
    live = int(((weight != 0) | before).sum())
    assert int(which.sum()) == max(math.ceil(share * live - 1e-9), int(before.sum()))
    new, left = weight.abs()[which & ~before], weight.abs()[~which]
    if len(new) and len(left):
        assert new.min() >= left.max()
    assert largest(weight, before, 1.0).all()


def weights(network: nn.Module) -> list[Tensor]:
    return [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_rounded_weights_stay_as_they_are_and_the_others_learn() -> None:
    """With momentum and decay, which move weights that have no gradient."""
    task = Noise(rate=0.0, epochs=3)
    method = INQ(task, shares=[0.5, 0.75, 0.875, 1.0])
    seen = []
    before_epoch = method.before_epoch

    def watched(epoch: int) -> None:
        before_epoch(epoch)
        seen.append([w.clone() for w in weights(task.full.network)])

    method.before_epoch = watched  # type: ignore[method-assign]
    rows = steps(task, method)
    seen.append([w.clone() for w in weights(task.full.network)])
    for share, (now, later) in zip((0.5, 0.75, 0.875), pairwise(seen), strict=True):
        for old, new in zip(now, later, strict=True):
            powers = torch.frexp(old).mantissa.abs() == 0.5
            assert int(powers.sum()) >= share * old.numel() * 0.98 - 1  # some are rounded to 0
            assert torch.equal(new[powers], old[powers])
            assert not torch.equal(new[~powers], old[~powers])
    assert [row.get("changed", False) for row in rows] == [False, False, True]
    for weight in seen[-1]:
        assert ((weight == 0) | (torch.frexp(weight).mantissa.abs() == 0.5)).all()


def test_what_is_rounded_is_not_let_go_where_others_have_overtaken_it() -> None:
    task = Noise(rate=0.0, epochs=3)
    method = INQ(task, shares=[0.5, 0.75, 0.875, 1.0])
    method.start()
    method.before_epoch(0)
    first = {name: which.clone() for name, which in method.state()["rounded"].items()}
    values = [w.clone() for w in weights(task.full.network)]
    for weight, which in zip(weights(task.full.network), first.values(), strict=True):
        weight[~which] = 100.0
    method.before_epoch(1)
    for weight, which, value in zip(
        weights(task.full.network), first.values(), values, strict=True
    ):
        assert torch.equal(weight[which], value[which])
        assert weight.max() == 100  # others are still learning
    rounded = method.state()["rounded"]
    assert all(rounded[name][which].all() for name, which in first.items())


@pytest.mark.parametrize(("epochs", "expected"), [(3, "abc"), (2, "bc"), (1, "c"), (7, "aabbccc")])
def test_steps_divide_the_epochs_and_the_last_of_them_is_always_trained(
    epochs: int, expected: str
) -> None:
    method = INQ(Noise(rate=0.0, epochs=epochs), shares=[0.5, 0.75, 0.875, 1.0])
    name = {0.5: "a", 0.75: "b", 0.875: "c"}
    assert "".join(name[method.share_during(epoch)] for epoch in range(epochs)) == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trained") / "w.pt"
    torch.manual_seed(0)
    torch.save(randomised(fpgm.model("resnet20", in_channels=1), 0).state_dict(), path)
    return f"pretrained={path}"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "words",
    [
        ("rate=0", "epochs=2"),
        ("rate=0", "epochs=0"),
        ("rate=0.4", "schedule=hard"),
        ("rate=0.4", "schedule=soft", "method.inq.bits=3"),
        ("rate=0.4", "schedule=fade"),
        ("rate=0.4", "schedule=gated"),
    ],
    ids=" ".join,
)
def test_all_weights_that_are_shipped_are_powers_of_two(
    tmp_path: Path, trained: str, words: tuple[str, ...]
) -> None:
    bits = 3 if "method.inq.bits=3" in words else 5
    report = whole(tmp_path / "r", "method=inq", trained, *words)
    small = fpgm.load(tmp_path / "r")
    count = 0
    for weight in weights(small):
        assert ((weight == 0) | (torch.frexp(weight).mantissa.abs() == 0.5)).all()
        assert len(weight.abs().unique()) <= 2 ** (bits - 2) + 1
        count += weight.numel()
    said = report["methods"]["inq"]
    assert said["exact"] == said["weights"] == count
    assert said["bits"] == bits
    packed = report["compact"]["packed"]
    assert packed["bits"] == bits
    assert packed["file"] == f"weights.b{bits}"
    assert (tmp_path / "r" / packed["file"]).stat().st_size == packed["bytes"]
    again = fpgm.load(tmp_path / "r" / packed["file"]).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in small.state_dict().items())
    if "rate=0.4" in words:
        assert report["pruning"]["pruned_filters"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=inq"], "method=inq: rounds the weights of a trained network"),
        (["method=inq", "method.inq.bits=1"], "method.inq.bits=1"),
        (["method=inq", "method.inq.shares=[0.5,0.4,1]"], "rising from above 0 to 1"),
        (["method=inq", "method.inq.shares=[0.5]"], "rising from above 0 to 1"),
        (["method=inq", "method.inq.shares=[]"], "rising from above 0 to 1"),
    ],
)
def test_what_cannot_be_is_named(words: list[str], message: str) -> None:
    with pytest.raises(Error) as said:
        asked(compose("dataset=digits", *words))
    assert message in str(said.value)
