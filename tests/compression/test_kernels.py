"""Few kernels stand for many, whatever way round they are, and learn as one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpgm.compression import kernels
from fpgm.compression.kernels import Shared


def around(kernel: Tensor) -> list[Tensor]:
    """A (9,) kernel in its eight flips and rotations, by torch's own operations."""
    square = kernel.view(3, 3)
    return [k.rot90(turns).flatten() for k in (square, square.T) for turns in range(4)]


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 9, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 12), st.integers(0, 99), st.booleans())
@settings(max_examples=30)
def test_as_many_centres_as_different_kernels_lose_nothing(
    different: int, seed: int, turns: bool
) -> None:
    rows = randn(different, seed)[torch.arange(3 * different) % different]
    found = kernels.shared(rows, different, seed, turns)
    assert kernels.loss(rows, found) < 1e-10
    assert len(kernels.shared(rows, 10 * len(rows), seed, turns).centres) <= len(rows)


@given(st.integers(0, 99))
@settings(max_examples=20)
def test_a_kernel_in_all_its_turns_is_one(seed: int) -> None:
    rows = torch.stack(around(randn(1, seed)[0]))
    assert kernels.loss(rows, kernels.shared(rows, 1, seed)) < 1e-10
    assert kernels.loss(rows, kernels.shared(rows, 1, seed, turns=False)) > 1


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=40)
def test_turning_kernels_never_loses_more(count: int, centres: int, seed: int) -> None:
    rows = randn(count, seed)
    plain = kernels.loss(rows, kernels.shared(rows, centres, seed, turns=False))
    assert kernels.loss(rows, kernels.shared(rows, centres, seed)) <= plain * (1 + 1e-6)


@given(st.integers(0, 99), st.booleans())
@settings(max_examples=20)
def test_each_kernel_has_the_nearest_of_all_centres_in_all_their_turns(
    seed: int, turns: bool
) -> None:
    rows = randn(30, seed)
    found = kernels.shared(rows, 4, seed, turns)
    shown = (rows - found.kernels()).square().sum(1)
    for row, distance in zip(rows, shown, strict=True):
        ways = [w for c in found.centres for w in (around(c) if turns else [c])]
        least = min(float((row - way).square().sum()) for way in ways)
        assert float(distance) == pytest.approx(least, rel=1e-4, abs=1e-6)


def test_few_kernels_are_parted_as_well_as_they_can_be() -> None:
    """Against all ways to part six kernels into two, without turns."""
    for seed in range(5):
        rows = randn(6, seed).double()
        best = min(
            sum(
                float((rows[m] - rows[m].mean(0)).square().sum())
                for m in (torch.tensor(mask), ~torch.tensor(mask))
                if m.any()
            )
            for mask in itertools.product([False, True], repeat=6)
        )
        tries = [kernels.loss(rows, kernels.shared(rows, 2, s, turns=False)) for s in range(12)]
        assert min(tries) == pytest.approx(best, rel=1e-6)


@given(st.integers(0, 99))
@settings(max_examples=20)
def test_a_centre_s_gradient_is_autograd_s(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    centres = randn(5, seed).requires_grad_()
    which, turn = (torch.randint(n, (40,), generator=g) for n in (5, 8))
    shown = Shared(centres, which, turn).kernels()
    outside = torch.randn(40, 9, generator=g)
    (shown * outside).sum().backward()
    by_hand = kernels.gathered(outside, Shared(centres.detach(), which, turn))
    assert torch.allclose(by_hand, centres.grad, atol=1e-5)


def test_bytes_are_those_of_the_formula() -> None:
    assert kernels.bits(256, 29_712, turns=True) == 288 * 256 + 29_712 * (8 + 3)
    assert kernels.bits(1, 10, turns=False) == 288
