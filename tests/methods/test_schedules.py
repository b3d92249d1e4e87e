"""What each schedule does to the pruned filters of a network in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from zoo import randomised

import fpgm
from fpgm.config import Config, Criterion, Dataset, Optimizer, Schedule
from fpgm.methods import schedules
from fpgm.methods.zeroing import Pruning

DIGITS = Dataset(
    name="digits", root=None, image_size=None, pad=1, flip=False, workers=None, on_error="stop"
)
GM = Criterion(name="gm", distance="l2", norm_share=None, batches=None, slimming=None)
FROZEN = Schedule(
    name="frozen",
    interval=1,
    zero_at_start=True,
    reset_momentum=True,
    settle=1.0,
    recalibrate=0,
    train_compact=False,
)
SOFT = replace(FROZEN, name="soft", reset_momentum=False)
SGD = Optimizer(
    lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, milestones=(0.3, 0.6, 0.8), gamma=0.2,
    warmup_epochs=0,
)  # fmt: skip


def config(schedule: Schedule, **changes) -> Config:
    base = Config(
        dataset=DIGITS,
        arch="resnet20", criterion=GM,
        schedule=schedule, optimizer=SGD, rate=0.4, epochs=4, batch_size=16, seed=0, device="cpu",
        precision="float32", pretrained=None, macs_target=None, residual="independent", align=1,
        compile=False, tune=False, target="torch", target_batch=1, scope="layer",
        scope_norm="mean", floor=0.1,
    )  # fmt: skip
    return replace(base, **changes)


def trained(c: Config, steps: int = 3) -> tuple[list[dict], Pruning]:
    """A few steps of each epoch on noise, as the loop takes them. Returns what each epoch did."""
    torch.manual_seed(0)
    model = randomised(fpgm.model("resnet20"), 0).train()
    o = c.optimizer
    sgd = torch.optim.SGD(
        model.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=True
    )
    pruning = Pruning(model, sgd, c, (3, 12, 12))
    pruning.start()
    rows = []
    for epoch in range(c.epochs):
        pruning.start_epoch()
        for _ in range(steps):
            x, y = torch.randn(8, 3, 12, 12), torch.randint(10, (8,))
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            pruning.after_backward(schedules.masked(c.schedule, epoch, c.epochs))
            sgd.step()
        rows.append(pruning.after_epoch(epoch))
    return rows, pruning


def test_frozen_from_scratch_never_moves_a_pruned_filter_and_has_no_churn() -> None:
    rows, pruning = trained(config(FROZEN))
    assert all(row["churn"] == 0 and row["revived"] == 0 for row in rows)
    assert not any(row["changed"] for row in rows)
    assert pruning.count == 264


def test_soft_lets_pruned_filters_grow_back_and_says_so() -> None:
    rows, pruning = trained(config(SOFT))
    assert rows[0]["revived"] > 0
    assert rows[0]["changed"]
    assert rows[0]["revived"] + rows[0]["dead"] == pruning.count  # a gradient is what revives
    assert pruning.revived() == 0  # zeroed again at the end


def test_frozen_after_a_free_epoch_moves_by_momentum_unless_it_is_cleared() -> None:
    late = replace(FROZEN, zero_at_start=False)
    rows, _ = trained(config(late))
    assert [row["revived"] for row in rows] == [0, 0, 0, 0]
    rows, _ = trained(config(replace(late, reset_momentum=False)))
    assert rows[1]["revived"] == 264  # the published code: frozen filters still move


def test_settle_fixes_the_selection_and_costs_nothing_at_the_end() -> None:
    rows, _ = trained(config(replace(SOFT, settle=0.5)))
    assert rows[1]["revived"] > 0
    assert [(row["revived"], row["churn"]) for row in rows[2:]] == [(0, 0), (0, 0)]
    rows, pruning = trained(config(replace(SOFT, name="asymptotic", settle=0.5)))
    assert pruning.count == 264  # the full rate by then, not what the curve says


def test_settled_from_the_start_prunes_at_the_start() -> None:
    _, pruning = trained(config(replace(SOFT, settle=0.0, zero_at_start=False)))
    assert pruning.count == 264


def test_hard_selects_once() -> None:
    rows, pruning = trained(config(replace(FROZEN, name="hard")))
    assert pruning.count == 264
    assert not any(row["changed"] for row in rows)


def test_interval_selects_every_so_many_epochs_and_always_at_the_end() -> None:
    at = [schedules.rate_after(replace(SOFT, interval=3), e, 8, 0.4) for e in range(8)]
    assert [rate is not None for rate in at] == [0, 0, 1, 0, 0, 1, 0, 1]


def test_baseline_goes_through_the_same_loop() -> None:
    rows, pruning = trained(config(FROZEN, rate=0.0))
    assert pruning.count == 0
    assert all(row["churn"] == 0 and row["dead"] == 0 for row in rows)


def test_asymptotic_rate_follows_the_published_curve() -> None:
    known = {0: 0, 1: 0.0217, 5: 0.0973, 10: 0.1709, 25: 0.3007, 50: 0.3753, 100: 0.3985, 199: 0.4}
    for t, rate in known.items():
        assert schedules.asymptotic(t, 199, 0.4) == pytest.approx(rate, abs=5e-5)
    assert schedules.asymptotic(199 / 8, 199, 0.4) == pytest.approx(0.3)
    assert schedules.asymptotic(0, 0, 0.4) == 0.4
    curve = replace(SOFT, name="asymptotic")
    assert schedules.rate_before(curve, 0.4) is None
    assert schedules.rate_after(curve, 199, 200, 0.4) == 0.4


def test_learning_rate_falls_where_the_papers_let_it_fall() -> None:
    rates = [schedules.learning_rate(SGD, epoch, 200) for epoch in (0, 59, 60, 119, 120, 160, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.0008, 0.0008])
    warm = replace(SGD, warmup_epochs=1)
    assert schedules.learning_rate(warm, 0, 200) == pytest.approx(0.01)
    assert schedules.learning_rate(warm, 1, 200) == pytest.approx(0.1)


def test_masking_takes_no_gradient_from_a_kept_filter() -> None:
    model = randomised(fpgm.model("resnet20"), 0).train()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    pruning = Pruning(model, sgd, config(FROZEN), (3, 12, 12))
    pruning.start()
    F.cross_entropy(model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 3])).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    pruning.after_backward(masked=True)
    for name, kept in pruning.keep.items():
        gradient = model.get_submodule(name).weight.grad
        assert torch.equal(gradient[kept], before[f"{name}.weight"][kept])
        others = [i for i in range(len(gradient)) if i not in kept.tolist()]
        assert not gradient[others].any()
