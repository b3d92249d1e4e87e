"""Gates and fading: what they compute, what learns behind them, and that nothing is lost."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tasks import Noise, few, steps, whole
from torch import Tensor, nn

import fpgm
from fpgm.errors import Error, GraphError
from fpgm.graph.flow import tails
from fpgm.graph.trace import trace
from fpgm.methods.schedules.fade import Fade
from fpgm.methods.schedules.gated import Gated, growth
from fpgm.pruning.gates import Gate, gated
from fpgm.pruning.method import Trained
from fpgm.pruning.settling import Settling
from fpgm.pruning.silence import Silence
from fpgm.selection.zero import pruned

__all__ = ["few"]  # a fixture


class Plain(nn.Module):
    """A convolution with a BatchNorm and one without, behind an activation that moves zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.fc = nn.Conv2d(6, 5, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        return self.fc(torch.sigmoid(self.b(x)).mean((2, 3)))


class Dropping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


def of(model: nn.Module) -> tuple[nn.Module, dict[str, Gate]]:
    graph = trace(model)
    return gated(graph, tails(graph), [name for _, name in graph.convolutions()])


@pytest.mark.parametrize("network", [lambda: fpgm.model("resnet20"), Plain])
def test_with_all_gates_open_a_step_is_that_of_the_dense_network(network: Any) -> None:
    torch.manual_seed(0)
    dense = network().train()
    through, gates = of(copy.deepcopy(dense))
    assert gates
    inputs = torch.randn(4, 3, 8, 8)
    for model in (dense, through.train()):
        model(inputs).square().sum().backward()
    assert torch.equal(dense(inputs), through(inputs))
    theirs = dict(through.named_parameters())
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 99))
def test_a_closed_gate_passes_nothing_on_and_all_of_the_gradient_back(
    open_: list[bool], seed: int
) -> None:
    torch.manual_seed(seed)
    maps = torch.randn(2, 6, 3, 3, requires_grad=True)
    gate = Gate(torch.zeros(6, 3, 1, 1))
    gate.mask.copy_(torch.tensor(open_).view(1, -1, 1, 1))
    said = gate(maps)
    closed = ~torch.tensor(open_)
    assert torch.equal(said[:, ~closed], maps[:, ~closed])
    assert not said[:, closed].any()
    upstream = torch.randn_like(said)
    said.backward(upstream)
    assert maps.grad is not None
    assert torch.equal(maps.grad, upstream)
    assert gate(maps.bfloat16()).dtype == torch.bfloat16


def test_a_pruned_filter_gets_the_gradient_of_the_dense_layer_at_the_masked_output() -> None:
    torch.manual_seed(0)
    model = Plain().train()
    through, gates = of(model)
    gates["a"].mask[0, :3] = 0
    inputs = torch.randn(4, 3, 8, 8)
    through(inputs).square().sum().backward()
    found = model.a.weight.grad
    assert found is not None
    found = found.clone()
    assert found[:3].flatten(1).any(1).all()
    # The same by hand: the gradient at the masked maps, sent back through the open layer.
    model.zero_grad()
    maps = torch.relu(model.norm(model.a(inputs)))
    masked = (maps * gates["a"].mask).detach().requires_grad_()
    model.fc(torch.sigmoid(model.b(masked)).mean((2, 3))).square().sum().backward()
    maps.backward(masked.grad)
    assert torch.allclose(found, model.a.weight.grad, atol=1e-6)


def test_all_else_learns_from_the_network_as_it_computes() -> None:
    """Of what is masked no gradient comes to the layers before it."""
    torch.manual_seed(0)
    model = fpgm.model("resnet20").train()
    through, gates = of(model)
    masks = {name: (torch.arange(gate.mask.numel()) % 2).bool() for name, gate in gates.items()}
    for name, gate in gates.items():
        gate.mask.copy_(masks[name].view(1, -1, 1, 1))
    inputs = torch.randn(4, 3, 16, 16)
    through(inputs).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    # By hand: the masks as plain factors.
    plain = trace(model)
    for name, tail in tails(plain).items():
        with plain.module.graph.inserting_after(tail.last):
            factor = masks[name].view(1, -1, 1, 1).float()
            plain.module.register_buffer(f"mask_{name.replace('.', '_')}", factor)
            mask = plain.module.graph.get_attr(f"mask_{name.replace('.', '_')}")
        with plain.module.graph.inserting_after(mask):
            product = plain.module.graph.call_function(torch.mul, (tail.last, mask))
        tail.last.replace_all_uses_with(product)
        product.args = (tail.last, mask)
    plain.module.recompile()
    plain.module.train()(inputs).square().sum().backward()
    layers = {f"{name}.weight": mask for name, mask in masks.items()}
    for name, parameter in model.named_parameters():
        kept = layers.get(name)
        ours, theirs = found[name], parameter.grad
        if kept is not None:
            # Of a stream masked on both sides of an add the ReLU behind it lets none through.
            assert ".conv1" not in name or ours[~kept].flatten(1).any(1).float().mean() > 0.8
            ours, theirs = ours[kept], theirs[kept]
        if "bn" not in name and "norm" not in name:
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("t", "share"), [(0, 0), (10, 0.420), (20, 0.675), (30, 0.830), (40, 0.924), (55, 1)]
)
def test_the_rate_grows_as_published(t: int, share: float) -> None:
    assert growth(t / 55) == pytest.approx(share, abs=5e-4)


def test_criteria_that_look_at_images_are_refused(tmp_path: Path, few: None) -> None:
    with pytest.raises(Error, match="schedule=gated: criterion=taylor looks at images"):
        whole(tmp_path, "schedule=gated", "criterion=taylor", "criterion.batches=1")


def test_without_epochs_it_prunes_a_trained_network_in_full(tmp_path: Path, few: None) -> None:
    whole(tmp_path / "base", "rate=0", "epochs=1")
    start = (f"pretrained={tmp_path}/base", "epochs=0", "schedule=gated", "schedule.growth=0.5")
    assert whole(tmp_path / "run", *start)["pruning"]["pruned_filters"] == 264


def test_what_is_silenced_computes_what_the_gates_did() -> None:
    torch.manual_seed(0)
    model = Plain()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
    through, gates = of(model)
    keep = {"a": torch.tensor([1, 4]), "b": torch.tensor([0, 2, 3])}
    masks = pruned(model, keep)
    for name, gate in gates.items():
        gate.mask.copy_((~masks[name]).view(1, -1, 1, 1))
    inputs = torch.randn(4, 3, 8, 8)
    expected = through.eval()(inputs)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    Silence(masks, tails(trace(model)), Trained(model, sgd)).scale(0.0)
    assert torch.allclose(model.eval()(inputs), expected, atol=1e-6)
    assert torch.allclose(fpgm.compact(model, keep)(inputs), expected, atol=1e-6)


def test_functions_that_were_traced_in_evaluation_are_refused() -> None:
    with pytest.raises(GraphError, match="use the layer"):
        of(Dropping())


@pytest.mark.parametrize("every", [0, 1])
def test_a_filter_that_gets_better_is_chosen_in_place_of_another(every: int) -> None:
    task = Noise(epochs=4)
    schedule = Gated(task, settle=0.75, every=every)
    rows = steps(task, schedule, count=6)
    assert sum(row["churn"] for row in rows[:3]) > 0
    assert rows[3]["churn"] == 0
    assert sum(row["revived"] for row in rows[:3]) > 0
    assert schedule.settled_at == {"epoch": 3, "at_rest": None}


def test_behind_a_closed_gate_filters_learn_their_direction_and_nothing_else() -> None:
    """Its gradient is never answered: it lengthens them until a criterion chooses them for it."""
    task = Noise(epochs=1, rate=0.5)
    for group in task.full.optimizer.param_groups:
        group |= {"lr": 1.0, "weight_decay": 0.0}
    schedule = Gated(task, settle=1.0)
    schedule.settling = Settling(1.0, 0.6, 1)  # no cool-down
    schedule.start()
    network, name, norm = task.full.network, "layer2.1.conv1", "layer2.1.bn1"
    mask = pruned(network, schedule.keep)[name]
    before = {k: v.clone() for k, v in network.state_dict().items()}
    schedule.before_epoch(0)
    for _ in range(3):
        x, y = next(task.batches(1))
        task.trained.optimizer.zero_grad()
        F.cross_entropy(task.trained.network(x), y).backward()
        schedule.after_backward()
        task.trained.optimizer.step()
        schedule.after_step()
    then, drifted = (v[f"{name}.weight"].flatten(1) for v in (before, network.state_dict()))
    turned = F.cosine_similarity(then, drifted)
    assert (turned[mask] < 0.999).float().mean() > 0.7  # some never fire
    longer = drifted.norm(dim=1) / then.norm(dim=1)
    assert longer[mask].mean() > 1.05
    for part in ("weight", "bias"):
        now = network.state_dict()[f"{norm}.{part}"]
        assert torch.equal(now[mask], before[f"{norm}.{part}"][mask])
        assert not torch.equal(now[~mask], before[f"{norm}.{part}"][~mask])
    schedule._level()
    after = network.state_dict()[f"{name}.weight"].flatten(1)
    assert torch.allclose(F.cosine_similarity(after, drifted), torch.ones(len(mask)), atol=1e-5)
    growth_of_others = drifted[~mask].norm(dim=1).mean() / then[~mask].norm(dim=1).mean()
    expected = then[mask].norm(dim=1) * growth_of_others
    assert torch.allclose(after[mask].norm(dim=1), expected, rtol=1e-4)
    assert torch.equal(after[~mask], drifted[~mask])


def test_after_it_has_settled_nothing_comes_back() -> None:
    task = Noise(epochs=3)
    schedule = Gated(task, settle=0.4)
    steps(task, schedule)
    assert task.trained is task.full
    network = task.full.network
    for name, mask in pruned(network, schedule.keep).items():
        modules = [network.get_submodule(n) for n in (name, *schedule._tails[name].norms)]
        for parameter in (p for module in modules for p in (module.weight, module.bias)):
            assert parameter is None or not parameter[mask].any()
            assert parameter is None or parameter[~mask].any()


def test_the_rate_grows_to_the_one_asked_for() -> None:
    task = Noise(epochs=5)
    rows = steps(task, Gated(task, growth=0.6, settle=0.8))
    pruned_filters = [row["pruned"] for row in rows]
    assert pruned_filters[0] == 0
    assert 0 < pruned_filters[1] < pruned_filters[2] < pruned_filters[3]
    assert pruned_filters[3] == pruned_filters[4] == 264


def history(directory: Path) -> list[dict[str, str]]:
    with open(directory / "history.csv") as file:
        return list(csv.DictReader(file))


def test_nothing_is_lost_at_the_last_zeroing(tmp_path: Path, few: None) -> None:
    """Also where it never settles: then the last selection is what is trained."""
    report = whole(tmp_path / "a", "schedule=gated", "epochs=4", "optimizer.lr=0.02")
    accuracy = report["accuracy"]
    assert abs(accuracy["dense"] - accuracy["zeroed_last"]) < 0.2
    assert accuracy["compact_last"] == accuracy["zeroed_last"]
    rows = history(tmp_path / "a")
    assert sum(float(row["churn"]) for row in rows) > 0
    assert float(rows[-1]["churn"]) == 0


def test_fading_is_a_straight_line_to_exactly_zero() -> None:
    task = Noise(epochs=2, from_scratch=False)
    schedule = Fade(task, duration=5 / 6)
    before = {k: v.clone() for k, v in task.full.network.state_dict().items()}
    schedule.start()
    schedule.before_epoch(0)
    name, norm = "layer1.0.conv1", "layer1.0.bn1"
    mask = pruned(task.full.network, schedule.keep)[name]
    for expected in (0.8, 0.6, 0.4, 0.2, 0.0, 0.0):
        schedule.after_step()
        now = task.full.network.state_dict()
        for key in (f"{name}.weight", f"{norm}.weight", f"{norm}.bias"):
            assert torch.allclose(now[key][mask], expected * before[key][mask], atol=1e-6)
            assert torch.equal(now[key][~mask], before[key][~mask])
    assert not now[f"{name}.weight"][mask].any()


def test_what_has_faded_stays_away_and_forgets_its_momentum() -> None:
    task = Noise(epochs=2, from_scratch=False)
    schedule = Fade(task, duration=0.5)
    rows = steps(task, schedule)
    network, sgd = task.full.network, task.full.optimizer
    for name, mask in pruned(network, schedule.keep).items():
        weight = network.get_submodule(name).weight
        assert not weight[mask].any()
        assert not sgd.state[weight]["momentum_buffer"][mask].any()
    assert [row["revived"] for row in rows] == [0, 0]
    assert not any(row["changed"] for row in rows)


def gone(network: nn.Module, schedule: Fade) -> bool:
    """Whether all that is pruned is at zero, with what stands behind it."""
    now = network.state_dict()
    for name, mask in pruned(network, schedule.keep).items():
        norms = [f"{norm}.{p}" for norm in schedule._tails[name].norms for p in ("weight", "bias")]
        for key in (f"{name}.weight", *norms):
            if now[key][mask].any():
                return False
    return True


def test_without_duration_all_is_gone_before_the_first_step() -> None:
    task = Noise(epochs=2, from_scratch=False)
    schedule = Fade(task, duration=0)
    before = {k: v.clone() for k, v in task.full.network.state_dict().items()}
    schedule.start()
    assert gone(task.full.network, schedule)
    name = "layer1.0.conv1"
    kept = schedule.keep[name]
    assert torch.equal(
        task.full.network.layer1[0].conv1.weight[kept], before[f"{name}.weight"][kept]
    )
    assert schedule.still_during(0)  # the compact network is trained from the first step


def test_a_training_that_ends_early_has_lost_what_was_fading() -> None:
    task = Noise(epochs=2, from_scratch=False)
    schedule = Fade(task, duration=1)
    schedule.start()
    schedule.before_epoch(0)
    schedule.after_step()
    assert not gone(task.full.network, schedule)
    schedule.finish()
    assert gone(task.full.network, schedule)


def test_fading_needs_something_to_fade(tmp_path: Path, few: None) -> None:
    with pytest.raises(Error, match="schedule=fade: prunes a trained network"):
        whole(tmp_path, "schedule=fade")
