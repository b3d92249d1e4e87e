"""What each schedule does to the pruned filters of a network in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tasks import Noise, count, steps
from zoo import randomised

import fpgm
from fpgm.criteria.evidence import gather
from fpgm.errors import Error
from fpgm.methods.beside.slimming import Slimming
from fpgm.methods.schedules.papers import Asymptotic, Frozen, Hard, Soft, asymptotic
from fpgm.selection.rule import Rule


def trained(kind: type, task: Noise | None = None, **options: Any) -> tuple[list[dict], Any]:
    task = task or Noise()
    schedule = kind(task, **options)
    return steps(task, schedule), schedule


def test_frozen_from_scratch_never_moves_a_pruned_filter_and_has_no_churn() -> None:
    rows, schedule = trained(Frozen)
    assert all(row["churn"] == 0 and row["revived"] == 0 for row in rows)
    assert not any(row["changed"] for row in rows)
    assert count(schedule) == 264


def test_soft_lets_pruned_filters_grow_back_and_says_so() -> None:
    rows, schedule = trained(Soft)
    assert rows[0]["revived"] > 0
    assert rows[0]["changed"]
    assert rows[0]["pruned"] == 264
    assert rows[0]["revived"] + rows[0]["dead"] == 264  # a gradient is what revives
    assert schedule.watch().revived() == 0  # zeroed again at the end


def test_soft_as_printed_zeroes_nothing_before_the_first_epoch() -> None:
    task = Noise(epochs=2)
    schedule = Soft(task, zero_at_start=False)
    schedule.start()
    assert count(schedule) == 0
    rows = steps(task, schedule)
    assert [row["pruned"] for row in rows] == [0, 264]
    assert rows[0]["changed"]
    assert rows[0]["churn"] == 1


def test_frozen_after_a_free_epoch_moves_by_momentum_unless_it_is_cleared() -> None:
    rows, _ = trained(Frozen, zero_at_start=False)
    assert [row["revived"] for row in rows] == [0, 0, 0, 0]
    rows, _ = trained(Frozen, zero_at_start=False, reset_momentum=False)
    assert rows[1]["revived"] == 264  # the published code: frozen filters still move


def test_settle_fixes_the_selection_and_costs_nothing_at_the_end() -> None:
    rows, _ = trained(Soft, settle=0.5)
    assert rows[1]["revived"] > 0
    assert [(row["revived"], row["churn"]) for row in rows[2:]] == [(0, 0), (0, 0)]
    rows, schedule = trained(Asymptotic, settle=0.5)
    assert [row["pruned"] for row in rows] == [0, 0, 264, 264]
    assert count(schedule) == 264  # the full rate by then, not what the curve says


def test_settled_from_the_start_prunes_at_the_start() -> None:
    _, schedule = trained(Soft, settle=0.0, zero_at_start=False)
    assert count(schedule) == 264


def test_hard_selects_once() -> None:
    rows, schedule = trained(Hard)
    assert count(schedule) == 264
    assert not any(row["changed"] for row in rows)
    assert [row["churn"] for row in rows] == [0, 0, 0, 0]


def test_hard_selects_once_by_the_weights_before_the_first_epoch() -> None:
    task = Noise()
    expected = fpgm.select(task.full.network, "gm", 0.4)
    _, schedule = trained(Hard, task)
    assert all(torch.equal(schedule.keep[name], kept) for name, kept in expected.items())


def test_interval_selects_after_the_first_epoch_every_so_many_and_the_last() -> None:
    schedule = Soft(Noise(epochs=8), interval=3)
    at = [schedule.share_after(epoch) for epoch in range(8)]
    assert at == [1.0, None, None, 1.0, None, None, 1.0, 1.0]
    settling = Soft(Noise(epochs=8), interval=3, settle=0.375)
    at = [settling.share_after(epoch) for epoch in range(8)]
    assert at == [1.0, None, 1.0, *[None] * 5]  # before it settles it selects once more


def test_baseline_goes_through_the_same_loop() -> None:
    rows, schedule = trained(Frozen, Noise(rate=0.0))
    assert count(schedule) == 0
    assert all(row["churn"] == 0 and row["dead"] == 0 for row in rows)


def test_asymptotic_rate_follows_the_published_curve() -> None:
    curve = {0: 0, 1: 0.0217, 5: 0.0973, 10: 0.1709, 25: 0.3007, 50: 0.3753, 100: 0.3985, 199: 0.4}
    for t, rate in curve.items():
        assert asymptotic(t, 199, 0.4) == pytest.approx(rate, abs=5e-5)
    assert asymptotic(199 / 8, 199, 0.4) == pytest.approx(0.3)
    assert asymptotic(0, 0, 0.4) == 0.4
    schedule = Asymptotic(Noise(epochs=200))
    assert schedule.share_before() is None
    assert schedule.share_after(199) == 1
    assert schedule.share_after(50) == pytest.approx(0.3753 / 0.4, abs=2e-4)


def test_asymptotic_prunes_more_from_epoch_to_epoch() -> None:
    rows, _ = trained(Asymptotic)
    pruned = [row["pruned"] for row in rows]
    assert pruned[:2] == [0, 0]  # the curve starts at 0
    assert 0 < pruned[2] <= pruned[3] <= 264


@pytest.mark.parametrize("masked", [True, False])
def test_masking_takes_no_gradient_from_a_kept_filter_and_all_from_a_pruned_one(
    masked: bool,
) -> None:
    task = Noise()
    schedule = Frozen(task) if masked else Soft(task)
    schedule.start()
    schedule.before_epoch(0)
    model = task.full.network
    F.cross_entropy(model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 3])).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    schedule.after_backward()
    for name, kept in schedule.keep.items():
        gradient = model.get_submodule(name).weight.grad
        assert torch.equal(gradient[kept], before[f"{name}.weight"][kept])
        others = [i for i in range(len(gradient)) if i not in kept.tolist()]
        assert not gradient[others].any() or not masked
        assert masked or torch.equal(gradient, before[f"{name}.weight"])


def test_slimming_adds_its_penalty_to_the_gradients_of_all_scales_and_nothing_else() -> None:
    task = Noise()
    model, method = task.full.network, Slimming(task, strength=0.25)
    method.before_epoch(0)
    F.cross_entropy(model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 3])).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    method.after_backward()
    for name, p in model.named_parameters():
        scale = "bn" in name and name.endswith("weight")
        added = 0.25 * p.detach().sign() if scale else torch.zeros_like(p)
        torch.testing.assert_close(p.grad, before[name] + added)


@pytest.mark.parametrize(
    ("name", "residual", "align", "scope"),
    [
        ("bn_gamma", "independent", 8, "global"),
        ("taylor", "shared", 8, "layer"),
        ("taylor", "inner", 1, "global"),
    ],
)
def test_frozen_never_changes_its_selection(
    name: str, residual: str, align: int, scope: str
) -> None:
    task = Noise(Rule(name, scope=scope, align=align), residual=residual, epochs=2)
    rows, schedule = trained(Frozen, task)
    assert count(schedule) > 0
    assert [row["churn"] for row in rows] == [0, 0]


@pytest.mark.parametrize("name", ["taylor", "hrank"])
def test_every_selection_looks_at_the_weights_of_its_own_epoch(name: str) -> None:
    task = Noise(Rule(name), epochs=3, from_scratch=False)
    rows, schedule = trained(Soft, task)
    assert rows[0]["revived"] > 0
    assert any(row["churn"] > 0 for row in rows)
    generator, model = torch.Generator().manual_seed(1), task.full.network
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    expected = fpgm.select(model, name, 0.4, evidence=gather(model, [name], task.shown()))
    before = schedule.keep
    schedule.after_epoch(0)
    assert all(torch.equal(schedule.keep[n], kept) for n, kept in expected.items())
    assert any(not torch.equal(before[n], kept) for n, kept in expected.items())


def test_what_is_expected_is_said_without_choosing() -> None:
    task = Noise(epochs=2)
    schedule = Soft(task)
    schedule.start()
    steps(task, schedule)
    keep, scores = schedule.keep, schedule.scores
    task.full.network.layer1[0].conv1.weight.data.normal_()
    expected = schedule.expected()
    assert not torch.equal(expected["layer1.0.conv1"], keep["layer1.0.conv1"])
    assert schedule.keep is keep
    assert schedule.scores is scores


def test_a_criterion_that_cannot_tell_filters_apart_is_refused_before_the_first_epoch() -> None:
    plain = fpgm.model("resnet20").train()  # every scale is 1
    with pytest.raises(Error, match=r"criterion=bn_gamma: .* conv1 .*18 more.*pretrained=RUN_DIR"):
        Frozen(Noise(Rule("bn_gamma"), model=plain)).start()
    assert all(p.flatten(1).any(1).all() for p in plain.parameters() if p.ndim == 4)
    pretrained = Noise(Rule("bn_gamma"), model=plain, from_scratch=False)
    Frozen(pretrained).start()
    (warning,) = pretrained.warnings
    assert "the lowest indices go first" in warning
    learnt = Noise(Rule("bn_gamma"), model=randomised(fpgm.model("resnet20"), 0))
    Frozen(learnt).start()
    assert learnt.warnings == []


def test_network_without_batchnorm_is_refused_before_anything_is_trained() -> None:
    model = fpgm.model("resnet20")
    model.layer1[1].bn2 = torch.nn.Identity()
    with pytest.raises(Error, match=r"there is none behind layer1.1.conv2; criterion=gm"):
        Frozen(Noise(Rule("bn_gamma"), model=model))
    Frozen(Noise(Rule("bn_gamma"), model=model, rate=0.0))


def test_recalibration_estimates_statistics_on_images_as_they_are() -> None:
    task = Noise()
    before = task.full.network.bn1.running_mean.clone()
    Frozen(task).finish()
    assert torch.equal(task.full.network.bn1.running_mean, before)
    Frozen(task, recalibrate=2).finish()
    network = task.full.network
    with torch.no_grad():
        maps = torch.cat([network.conv1(x).mean((2, 3)) for x, _ in task.batches(2)])
    torch.testing.assert_close(network.bn1.running_mean, maps.mean(0))
