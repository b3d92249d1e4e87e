"""The penalty on whole filters: its step is the proximal one, and no layer is emptied by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import Noise, few, steps, whole
from torch import Tensor

import fpgm
from fpgm.methods.beside.group_lasso import GroupLasso, shrinkage
from fpgm.methods.schedules.papers import Frozen
from fpgm.pruning.compacted import CompactTraining

__all__ = ["few"]  # a fixture


def minimum(filters: np.ndarray, threshold: float) -> np.ndarray:
    """argmin over x of |x - F|^2 / 2 + threshold |x|, searched: it lies on the way from 0 to F, as
    the part of x across F only adds to both terms."""
    shares = np.linspace(0, 1, 20_001)
    length = np.linalg.norm(filters)
    objective = (shares - 1) ** 2 * length**2 / 2 + threshold * shares * length
    return shares[objective.argmin()] * filters


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_a_step_minimises_the_distance_plus_the_penalty(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    filters[0] = 0
    norms = filters.norm(dim=1)
    factors, at_floor = shrinkage(norms, threshold, 1)
    after = filters * factors[:, None]
    assert after.isfinite().all()
    for index, (mine, given_) in enumerate(zip(after, filters, strict=True)):
        if at_floor and norms[index] == norms.max():
            assert torch.equal(mine, given_)
            continue
        np.testing.assert_allclose(mine, minimum(given_.numpy(), threshold), atol=2e-4)
        # And no other point near it, in any direction, is better.
        others = mine + 0.05 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
        worth = [
            (x - given_).square().sum(-1) / 2 + threshold * x.norm(dim=-1) for x in (mine, others)
        ]
        assert (worth[1] >= worth[0] - 1e-12).all()


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5, 1.0, 3.0]), min_size=1, max_size=8),
    st.floats(0, 4),
    st.integers(1, 8),
)
def test_no_layer_falls_below_its_floor_and_only_there_anything_is_spared(
    norms: list[float], threshold: float, least: int
) -> None:
    before = torch.tensor(norms, dtype=torch.float64)
    factors, at_floor = shrinkage(before, threshold, least)
    assert (factors >= 0).all()
    assert (factors <= 1).all()
    after = before * factors
    alive = sum(norm > 0 for norm in norms)
    assert int((after > 0).sum()) >= min(alive, least)
    plain = torch.tensor([max(0.0, norm - threshold) for norm in norms], dtype=torch.float64)
    emptied = int((plain > 0).sum()) < min(alive, least)
    assert bool(at_floor) == emptied
    if not emptied:
        torch.testing.assert_close(after, plain)
    else:
        # As they were, or as the step has them: nothing else is done.
        assert all(
            a == b or a == pytest.approx(p) for a, b, p in zip(after, before, plain, strict=True)
        )
        assert after.max() == before.max()


def filters(task: Noise) -> dict[str, Tensor]:
    modules = task.full.network.named_modules()
    return {n: m.weight.detach().clone() for n, m in modules if isinstance(m, torch.nn.Conv2d)}


def test_the_step_takes_the_learning_rate_of_its_moment_and_turns_no_filter() -> None:
    task = Noise(rate=0.0)
    method = GroupLasso(task, strength=2.0)
    method.before_epoch(0)
    before = filters(task)
    others = {n: p.clone() for n, p in task.full.network.named_parameters() if p.dim() != 4}
    task.full.optimizer.param_groups[0]["lr"] = 0.05
    method.after_step()
    for name, weight in filters(task).items():
        flat, old = weight.flatten(1), before[name].flatten(1)
        torch.testing.assert_close(flat.norm(dim=1), (old.norm(dim=1) - 0.1).clamp_min(0))
        torch.testing.assert_close(flat, old * (flat.norm(dim=1) / old.norm(dim=1))[:, None])
    after = dict(task.full.network.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in others.items())


def test_a_penalty_that_would_empty_every_layer_leaves_the_largest_and_says_so_once() -> None:
    task = Noise(rate=0.0, epochs=3)
    task.goal.rule.__dict__["floor"] = 0.25
    method = GroupLasso(task, strength=1e3)
    steps(task, Frozen(task), method)
    assert len(task.warnings) == len(task.prunable.layers)
    assert "method.group_lasso.strength=1000: drives all of conv1 to zero" in task.warnings[0]
    for name, weight in filters(task).items():
        assert int(weight.flatten(1).any(1).sum()) == len(weight) // 4, name
    other = GroupLasso(task, strength=1e3)
    other.resume(method.state())
    steps(task, Frozen(task), other)
    assert len(task.warnings) == len(task.prunable.layers)  # a resumed run does not repeat it
    closing = method.closing(task.full.network)
    assert closing["zero"]["layer3.0.conv1"] == 48
    assert sum(closing["zero"].values()) / closing["filters"] == 0.75
    assert closing["said"].startswith("group_lasso: 516 of 688 filters are zero")


def test_norms_are_taken_at_full_width_also_where_filters_are_pruned() -> None:
    """The compact network's filters are shorter, by the weights that read pruned channels."""
    task = Noise(epochs=2, rate=0.6, model=fpgm.model("resnet20").train())
    schedule = Frozen(task)
    method = GroupLasso(task, strength=0.1)
    trainer = CompactTraining(task, schedule, [method])  # type: ignore[arg-type]
    rows = steps(task, trainer, schedule, method)
    assert task.trained is task.full
    assert [row["revived"] for row in rows] == [0, 0]


@pytest.mark.usefixtures("few")
def test_filters_at_zero_are_cut_by_a_threshold_and_cost_nothing(tmp_path: Path) -> None:
    sparse = whole(tmp_path / "s", "rate=0", "method=group_lasso", "method.group_lasso.strength=5")
    said = sparse["methods"]["group_lasso"]
    gone = sum(said["zero"].values())
    assert gone > 10
    cut = ("criterion=l2", "schedule=hard", "threshold=1e-6", "epochs=0")
    pruned = whole(tmp_path / "p", *cut, f"pretrained={tmp_path / 's'}")
    assert pruned["pruning"]["pruned_filters"] == gone
    assert pruned["accuracy"]["compact_last"] == sparse["accuracy"]["compact_last"]
    kept = {layer["name"]: layer["filters"] - layer["kept"] for layer in pruned["layers"]}
    assert all(kept[name] == zero for name, zero in said["zero"].items())


def test_a_strength_below_zero_is_refused() -> None:
    (line,) = GroupLasso.check({"strength": -1}, "method.group_lasso.")
    assert line.startswith("method.group_lasso.strength=-1")
