"""WHC: its oracles, and what leaves its order alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fpgm.criteria.whc import whc

ROWS = arrays("float64", (5, 3), elements=st.floats(-4, 4))


def layer(rows: Any) -> Tensor:
    return torch.as_tensor(rows, dtype=torch.float64).view(len(rows), -1, 1, 1)


@pytest.mark.parametrize(
    ("rows", "scores"),
    [
        ([[3, 0], [0, 4], [3, 4]], [18, 16, 10]),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [2, 2, 2]),
        ([[1, 2], [2, 4], [-3, -6]], [0, 0, 0]),
        ([[0, 0], [1, 0], [0, 1]], [0, 1, 1]),
    ],
)
def test_by_hand(rows: list[list[float]], scores: list[float]) -> None:
    assert whc(layer(rows)).tolist() == pytest.approx(scores, abs=1e-9)


@given(ROWS)
def test_it_is_the_papers_formula(rows: Any) -> None:
    points = torch.as_tensor(rows)
    sizes = points.norm(dim=1)
    for i, score in enumerate(whc(layer(rows)).tolist()):
        terms = [
            float(sizes[j] * (1 - (points[i] @ points[j]).abs() / (sizes[i] * sizes[j])))
            for j in range(len(points))
            if j != i and sizes[i] > 1e-9 and sizes[j] > 1e-9
        ]
        assert score == pytest.approx(float(sizes[i]) * sum(terms), abs=1e-6)


@given(
    ROWS,
    st.floats(0.1, 5),
    st.permutations(range(5)),
    st.lists(st.sampled_from([-1, 1]), min_size=5, max_size=5),
)
def test_scale_order_and_sign_say_nothing(
    rows: Any, scale: float, order: list[int], signs: list[int]
) -> None:
    before = whc(layer(rows))
    moved = torch.as_tensor(rows)[order] * torch.tensor(signs).view(-1, 1) * scale
    assert torch.allclose(whc(layer(moved)), scale**2 * before[order], atol=1e-8)
