"""ADMM: the nearest pruned network, what pulls towards it, and that it gets there."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import Noise, few, steps, whole
from torch import Tensor, nn

import fpgm
from fpgm.methods.beside.admm_weights import ADMMWeights
from fpgm.methods.beside.weights import largest
from fpgm.methods.schedules.admm import ADMM, lengths
from fpgm.methods.schedules.fade import Fade
from fpgm.methods.schedules.gated import Gated
from fpgm.methods.schedules.papers import Asymptotic, Frozen, Soft
from fpgm.networks.weights import weights_of
from fpgm.pruning.admm import Split
from fpgm.selection.rule import Rule

__all__ = ["few"]  # a fixture
seeds = st.integers(0, 2**31)


def trained(rate: float = 0.4, epochs: int = 4, **goal: object) -> Noise:
    return Noise(rate=rate, epochs=epochs, from_scratch=False, **goal)  # type: ignore[arg-type]


@given(seeds, st.sampled_from([0.2, 0.5, 0.7]))
@settings(max_examples=25)
def test_no_sparse_weight_is_nearer_than_the_projection(seed: int, rate: float) -> None:
    weight = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    kept = largest({"w": weight}, rate, "layer")["w"]
    near = (weight - weight * kept).square().sum()
    count = int(kept.sum())
    for places in itertools.combinations(range(8), count):
        other = torch.zeros(8)
        other[list(places)] = weight[list(places)]
        assert near <= (weight - other).square().sum() + 1e-6
    assert torch.equal(largest({"w": weight * kept}, rate, "layer")["w"] * weight, weight * kept)


def test_no_network_pruned_as_asked_is_nearer_and_it_is_its_own_projection() -> None:
    task = trained(rate=0.5)
    method = ADMM(task)
    method.start()
    weights = {name: w.detach() for name, w in method._weights().items()}
    assert method._pull.split is not None
    z = method._pull.split.z
    for name, weight in weights.items():
        shortest = lengths(weight).argsort()[: len(weight) // 2]
        gone = ~z[name].flatten(1).any(1)
        assert set(gone.nonzero().flatten().tolist()) == set(shortest.tolist())
        assert torch.equal(z[name][~gone], weight[~gone])
        weight.copy_(z[name])
    again = method._project(z)
    assert all(torch.equal(again[name], z[name]) for name in z)


def test_the_pull_is_the_gradient_of_its_penalty() -> None:
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    split = Split({"w": torch.randn(3, 2).double()}, {"w": torch.randn(3, 2).double()}, 0.3)
    weight.grad = torch.zeros_like(weight)
    split.pull({"w": weight})
    penalty = 0.15 * (weight - split.z["w"] + split.u["w"]).square().sum()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(penalty, weight)[0])


@given(seeds)
@settings(max_examples=20)
def test_what_they_differ_by_adds_up_and_means_the_same_to_the_loss(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, generator=generator, dtype=torch.float64)

    def project(w: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"w": w["w"] * largest(w, 0.5, "layer")["w"]}

    split = Split.of({"w": weight}, project, 0.2)
    dual = torch.zeros(6, dtype=torch.float64)  # rho U
    for _ in range(4):
        weight = weight + torch.randn(6, generator=generator, dtype=torch.float64)
        rho, wanted = split.rho, project({"w": weight + split.u["w"]})["w"]
        split.update({"w": weight}, project, 1.5)
        dual = dual + rho * (weight - wanted)
        torch.testing.assert_close(split.z["w"], wanted)
        torch.testing.assert_close(split.rho * split.u["w"], dual)
        assert split.rho == pytest.approx(1.5 * rho)


def test_a_quadratic_reaches_its_optimum_on_the_support() -> None:
    """min (x - a) A (x - a) / 2 with x outside the support zero: solved directly."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a, target = root @ root.T + torch.eye(6), torch.randn(6, generator=generator).double()
    support = torch.tensor([True, True, False, True, False, False])
    x = target.clone()

    def project(w: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"w": w["w"] * support}

    split = Split.of({"w": x}, project, 5.0)
    for _ in range(400):
        # The training of W to its end: (A + rho) x = A target + rho (z - u)
        eye = torch.eye(6, dtype=torch.float64)
        right = a @ target + split.rho * (split.z["w"] - split.u["w"])
        x = torch.linalg.solve(a + split.rho * eye, right)
        split.update({"w": x}, project, 1.0)
    optimum = torch.zeros(6, dtype=torch.float64)
    optimum[support] = torch.linalg.solve(a[support][:, support], (a @ target)[support])
    torch.testing.assert_close(split.z["w"], optimum, atol=1e-8, rtol=0)


def test_the_network_comes_near_to_the_pruned_one_before_it_is_cut_and_is_held_then() -> None:
    task = trained(epochs=16)
    method = ADMM(task, rho=1.0, interval=1.0, growth=1.2, ceiling=3.0, duration=0.75)
    rows = steps(task, method)
    assert 0 < method._pull.distances[-1] < 0.4 * method._pull.distances[0]
    assert [row["pruned"] for row in rows[:12]] == [0] * 12
    assert rows[11]["churn"] == 1
    assert rows[15]["revived"] == 0
    count = sum(int((~w.detach().flatten(1).any(1)).sum()) for w in method._weights().values())
    assert count == sum(int(len(w) * 0.4 + 1e-9) for w in method._weights().values())
    assert "at the cut" in method.closing(task.full.network)["said"]


def test_single_weights_come_near_and_are_held_then() -> None:
    task = Noise(rate=0.0, epochs=16)
    method = ADMMWeights(
        task, rate=0.6, rho=1.0, interval=1.0, growth=1.2, ceiling=3.0, duration=0.75
    )
    steps(task, Frozen(task), method)
    assert 0 < method._pull.distances[-1] < 0.4 * method._pull.distances[0]
    for weight in weights_of(task.full.network).values():
        assert int((weight == 0).sum()) == int(weight.numel() * 0.6 + 1e-9)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Soft, {"settle": 0.25}),
        (Asymptotic, {"settle": 0.25}),
        (Fade, {"duration": 0.25}),
        (Gated, {"settle": 0.25}),
    ],
)
def test_filters_that_a_schedule_holds_at_zero_are_not_pulled_off_it(
    kind: type, options: dict[str, float]
) -> None:
    """Else they grow back after they have settled, and the last zeroing costs accuracy."""
    task = trained(epochs=8)
    method = ADMMWeights(task, rho=0.1, interval=0.4, duration=0.75)
    rows = steps(task, kind(task, **options), method)
    assert rows[7]["pruned"] == 264
    assert [row["revived"] for row in rows[2:]] == [0] * 6


def test_it_wants_a_trained_network() -> None:
    (line,) = ADMM.problems(Noise().goal, from_scratch=True)
    assert line.startswith("schedule=admm: prunes a trained network, name it with pretrained=")


def test_filters_go_by_their_norm_whatever_the_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    for name in ("l2", "taylor"):  # the second would look at images
        task = trained(epochs=1, rule=Rule(name))
        monkeypatch.setattr(task, "shown", lambda: pytest.fail("it looks at images"))
        method = ADMM(task)
        steps(task, method)
        kept.append(method.keep)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.usefixtures("few")
def test_the_cut_is_at_the_goal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(fpgm.model("resnet20", in_channels=1).state_dict(), tmp_path / "w.pt")
    words = ("schedule=admm", "macs_target=0.5", "residual=inner", f"pretrained={tmp_path}/w.pt")
    report = whole(tmp_path / "r", *words)
    assert report["compact"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert report["pruning"]["settled"] == {"epoch": 1, "at_rest": None}
    assert len(report["methods"]["admm"]["distances"]) >= 2
