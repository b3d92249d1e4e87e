"""Criteria that look at the layers that read a filter's channel."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fpgm.criteria.criterion import criterion
from fpgm.criteria.views import Contributions, Readers, Worth
from fpgm.criteria.weights import l1

Share = Annotated[float, Field(ge=0, le=1, examples=["0.5"])]
Positions = Annotated[int, Field(ge=1, examples=["10"])]


def l1_of(weights: Tensor) -> Tensor:
    """(channels, d) -> (channels,)."""
    return weights.abs().sum(1)


@criterion(
    read=Readers(l1_of), macs_share=Worth("macs"), params_share=Worth("params")
)  # fmt: skip
def cpmc(
    weight: Tensor,
    *,
    read: Tensor,
    macs_share: Tensor,
    params_share: Tensor,
    balance: Share = 0.5,
) -> Tensor:
    """Weights over costs: (|F_j|_1 + |W_next[:, j]|_1) / (balance * MACs + (1 - balance) *
    parameters), each cost as a share of the network's. -> (N,).

    After CPMC (Channel Pruning via Multi-Criteria based on weight dependency), of which only the
    abstract is public: the weights of a filter and of who reads it, its parameters and its MACs, as
    one score for one ranking; the formula is ours. A sum of weights is not divided by that of the
    network, which is one number for all filters. Meant for scope=global scope_norm=none.
    """
    return (l1(weight) + read) / (balance * macs_share + (1 - balance) * params_share)


@criterion(places=True, contributions=Contributions())
def thinet(weight: Tensor, *, contributions: Tensor, positions: Positions = 10) -> Tensor:
    """ThiNet (Luo et al., ICCV 2017): the order in which filters go so that what is lost of the
    next layer's outputs, over samples m of them, stays least: sum_m (sum_{c gone} x_mc)^2. -> (N,).

    Greedy: of a set T that is gone the next is argmin_c G_cc + 2 sum_{t in T} G_tc, ties by lowest
    index. contributions: G = X^T X, (N, N). positions: of each image, at which it is gathered.
    """
    dead = ~weight.detach().flatten(1).any(1)
    return places_of(greedy(contributions, dead))


def greedy(gram: Tensor, gone: Tensor) -> Tensor:
    """The order in which columns of X go. gram: X^T X (N, N); gone: (N,) bool, those that have gone
    before. Returns indices (N,)."""
    own = gram.diagonal()
    digits = own.max().clamp_min(torch.finfo(gram.dtype).tiny) * 1e-11
    left, order = ~gone, gone.nonzero().flatten().tolist()
    lost = gram[:, gone].sum(1)
    while len(order) < len(gram):
        # Equal columns tie, whatever the last bits of their sums.
        costs = ((own + 2 * lost) / digits).round().masked_fill(~left, torch.inf)
        # The first of the least: argmin may give any on a GPU.
        nearest = int((costs == costs.min()).nonzero()[0])
        order.append(nearest)
        left[nearest] = False
        lost = lost + gram[:, nearest]
    return torch.tensor(order, device=gram.device)


def places_of(order: Tensor) -> Tensor:
    """An order of pruning as scores. Indices (N,) -> (N,) float64."""
    place = torch.arange(len(order), dtype=torch.float64, device=order.device)
    return torch.empty_like(place).scatter_(0, order, place)
