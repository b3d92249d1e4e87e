"""A layer has three values, in the network that is shipped and at every step before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from own_networks import Twice
from tasks import Noise, few, steps, whole
from torch import Tensor, nn
from zoo import randomised

import fpgm
from fpgm.errors import Error
from fpgm.methods.beside.ttq import TTQ, gradients, ternary
from fpgm.training.asked import asked

__all__ = ["few"]  # a fixture


def inner(network: nn.Module) -> list[Tensor]:
    found = [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return found[1:-1]


@given(st.integers(0, 99), st.floats(0, 0.6))
@settings(max_examples=30)
def test_gradients_are_finite_differences_of_the_loss(seed: int, threshold: float) -> None:
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(3, 5, generator=g, dtype=torch.float64)
    values = 0.2 + torch.rand(2, generator=g, dtype=torch.float64)
    outside = torch.randn(3, 5, generator=g, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return (weight * outside).sin().sum()

    weight = ternary(latent, values, threshold).requires_grad_()
    (grad,) = torch.autograd.grad(loss(weight), weight)
    behind, of_values, counts = gradients(grad, latent, values, threshold)
    small = 1e-6
    for index in range(2):
        moved = values.clone()
        moved[index] += small
        lost = loss(ternary(latent, moved, threshold)) - loss(ternary(latent, values, threshold))
        assert float(of_values[index]) == pytest.approx(float(lost / small), abs=1e-4)
    edge = threshold * latent.abs().max()
    for place, w in enumerate(latent.flatten()):
        scale = values[0] if w > edge else values[1] if w < -edge else 1.0
        assert behind.flatten()[place] == grad.flatten()[place] * scale
    assert counts.tolist() == [
        max(1, int((latent > edge).sum())),
        max(1, int((latent < -edge).sum())),
    ]


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=9), st.floats(0, 0.9))
def test_three_values_by_the_paper_s_rule(numbers: list[float], threshold: float) -> None:
    latent = torch.tensor(numbers)
    found = ternary(latent, torch.tensor([0.5, 0.25]), threshold)
    edge = threshold * max(map(abs, latent.tolist()))
    for w, value in zip(latent.tolist(), found.tolist(), strict=True):
        # The edge itself is a product that rounds.
        if abs(abs(w) - edge) > 1e-6:
            assert value == (0.5 if w > edge else -0.25 if w < -edge else 0.0)


def test_three_values_at_every_step_and_all_of_them_learn() -> None:
    task = Noise(rate=0.0, epochs=2)
    method = TTQ(task)
    for group in method.parameters():
        task.full.optimizer.add_param_group(group)
    assert task.full.optimizer.param_groups[-1]["weight_decay"] == 0
    seen = []
    after_step = method.after_step

    def watched() -> None:
        after_step()
        seen.append([w.clone() for w in inner(task.full.network)])

    method.after_step = watched  # type: ignore[method-assign]
    conv = next(m for m in task.full.network.modules() if isinstance(m, nn.Conv2d))
    first = conv.weight.detach().clone()
    steps(task, method)
    for weights in seen:
        assert all(len(weight.unique()) <= 3 for weight in weights)
    for before, after in zip(seen[0], seen[-1], strict=True):
        assert not torch.equal(before.unique(), after.unique())
    assert len(conv.weight.unique()) > 3  # the first stays in full precision
    assert not torch.equal(conv.weight, first)


def test_latent_weights_take_the_optimizer_s_step() -> None:
    """Plain descent: the latent weight moves by its own gradient, from where it was."""
    task = Noise(rate=0.0, epochs=1)
    method = TTQ(task)
    method.start()
    name, latent = next(iter(method.state()["latent"].items()))
    before, weight = latent.clone(), task.full.network.get_submodule(name).weight
    task.full.network(torch.randn(4, *task.image_shape)).square().sum().backward()
    values = method.state()["values"][name].clone()
    expected, sums, counts = gradients(weight.grad.clone(), before, values, 0.05)
    parameters = [p for group in method.parameters() for p in group["params"]]
    optimizer = torch.optim.SGD([*task.full.network.parameters(), *parameters], 0.1)
    method.after_backward()
    optimizer.step()
    method.after_step()
    state = method.state()
    assert torch.allclose(state["latent"][name], before - 0.1 * expected)
    assert torch.allclose(state["values"][name], values - 0.1 * sums / counts)
    assert torch.equal(weight, ternary(state["latent"][name], state["values"][name], 0.05))


@pytest.mark.usefixtures("few")
def test_what_is_shipped_takes_two_bits_a_weight(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.manual_seed(0)
    torch.save(randomised(fpgm.model("resnet20", in_channels=1), 0).state_dict(), path)
    report = whole(tmp_path / "r", "method=ttq", "rate=0", f"pretrained={path}")
    weights = inner(fpgm.load(tmp_path / "r"))
    assert all(len(weight.unique()) <= 3 for weight in weights)
    said, packed = report["methods"]["ttq"], report["compact"]["packed"]
    count = sum(weight.numel() for weight in weights)
    assert (said["layers"], said["weights"]) == (18, count)
    assert said["zeros"] == pytest.approx(sum(int((w == 0).sum()) for w in weights) / count)
    assert packed["file"] == "weights.b2"
    assert packed["bytes"] < report["dense"]["bytes"] / 10


def test_first_and_last_are_those_that_run_first_and_last() -> None:
    """A compact network has its layers in the order of their names."""
    model = randomised(fpgm.model("resnet20"), 0)
    small = fpgm.compact(model, fpgm.select(model, "gm", 0.4)).train()
    names = [n for n, m in small.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert names[-1] != "fc"
    task = Noise(rate=0.0, model=small)
    ternary_layers = TTQ(task).state()["latent"]
    assert set(names) - set(ternary_layers) == {"conv1", "fc"}


def test_it_is_refused_while_filters_are_pruned() -> None:
    with pytest.raises(Error, match=r"method=ttq: not while filters are pruned"):
        asked(compose("dataset=digits", "method=ttq", "rate=0.4"))


def test_layers_that_are_not_called_or_do_not_learn_are_left_alone() -> None:
    task = Noise(rate=0.0, model=Twice(10, 3))
    network = task.full.network
    before = {name: getattr(network, name).weight.clone() for name in ("auxiliary", "fixed")}
    method = TTQ(task)
    steps(task, method)
    assert all(torch.equal(getattr(network, n).weight, w) for n, w in before.items())
    assert len(network.again.weight.unique()) <= 3
