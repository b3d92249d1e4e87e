"""Kernels that are one stay one to the bit, through momentum and decay, and the file shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import compose
from own_networks import Twice
from tasks import Noise, few, steps, whole
from torch import Tensor, nn
from zoo import randomised

import fpgm
from fpgm.compression.kernels import turned_back
from fpgm.errors import Error
from fpgm.methods.beside.shared_kernels import SharedKernels
from fpgm.training.asked import asked

__all__ = ["few"]  # a fixture


def rows(network: nn.Module) -> Tensor:
    found = [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d)]
    return torch.cat([w.reshape(-1, 9) for w in found if w.shape[2:] == (3, 3)])


def different(kernels: Tensor, method: SharedKernels) -> int:
    """How many there are but for their turns; equal means equal bits."""
    state = method.state()
    back = turned_back(kernels, state["turn"])
    for index in state["which"].unique():
        same = back[state["which"] == index]
        assert (same == same[0]).all()
    return len(back.unique(dim=0))


@pytest.mark.parametrize("step", ["mean", "sum"])
def test_kernels_that_are_shared_move_together(step: str) -> None:
    task = Noise(rate=0.0, epochs=2)
    method = SharedKernels(task, count=12, step=step)
    before = rows(task.full.network)
    steps(task, method)
    after = rows(task.full.network)
    assert different(after, method) == 12
    assert not torch.allclose(before, after)
    assert "29,744 kernels are 12 now" in task.said[-1]


def test_a_step_is_that_of_the_mean_gradient() -> None:
    """Plain descent on noise: what a centre moves by is what its kernels would have, on average."""
    task = Noise(rate=0.0, epochs=1)
    method = SharedKernels(task, count=5)
    method.start()
    network, state = task.full.network, method.state()
    x = torch.randn(4, *task.image_shape)
    network(x).square().sum().backward()
    alone = torch.cat([
        m.weight.grad.reshape(-1, 9)
        for m in network.modules()
        if isinstance(m, nn.Conv2d) and m.weight.shape[2:] == (3, 3)
    ])  # fmt: skip
    start = rows(network)
    method.after_backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    method.after_step()
    moved = turned_back(rows(network) - start, state["turn"])
    for index in range(5):
        mine = state["which"] == index
        expected = -0.1 * turned_back(alone, state["turn"])[mine].mean(0)
        assert torch.allclose(moved[mine][0], expected, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trained") / "w.pt"
    torch.manual_seed(0)
    torch.save(randomised(fpgm.model("resnet20", in_channels=1), 0).state_dict(), path)
    return f"pretrained={path}"


@pytest.mark.usefixtures("few")
def test_the_packed_file_has_one_palette_for_the_network(tmp_path: Path, trained: str) -> None:
    words = ("method=shared_kernels", "method.shared_kernels.count=32", "rate=0", trained)
    report = whole(tmp_path / "r", *words)
    said, packed = report["methods"]["shared_kernels"], report["compact"]["packed"]
    assert (said["different"], said["kernels"]) == (32, 29_712)
    assert packed["file"] == "weights.b8"  # 5 for 32 kernels, 3 for their turns
    small = fpgm.load(tmp_path / "r").state_dict()
    again = fpgm.load(tmp_path / "r" / packed["file"]).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in small.items())
    others = 4 * (sum(v.numel() for v in small.values()) - 9 * said["kernels"])
    assert packed["bytes"] <= said["bits"] / 8 + others + 18_000  # names and shapes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rate=0"], "method=shared_kernels: shares the kernels of a trained network"),
        (["rate=0.4", "pretrained=x"], "not while filters are pruned; train what is left of them"),
        (["rate=0", "pretrained=x", "method.shared_kernels.count=0"], "count=0"),
    ],
)
def test_what_cannot_be_is_named(words: list[str], message: str) -> None:
    with pytest.raises(Error) as said:
        asked(compose("dataset=digits", "method=shared_kernels", *words))
    assert message in str(said.value)


def test_two_that_say_what_weights_may_be_are_named() -> None:
    with pytest.raises(Error) as said:
        asked(compose("dataset=digits", "rate=0", "pretrained=x", "method=[ttq,shared_kernels]"))
    assert "each of them says which values the weights may have" in str(said.value)


def test_a_network_without_3x3_kernels_is_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)
    )
    with pytest.raises(Error, match="no 3x3 kernels to share"):
        SharedKernels(Noise(rate=0.0, model=model))


def test_layers_that_are_not_called_or_do_not_learn_are_left_alone() -> None:
    task = Noise(rate=0.0, model=Twice(10, 3))
    network = task.full.network
    before = {name: getattr(network, name).weight.clone() for name in ("auxiliary", "fixed")}
    method = SharedKernels(task)
    steps(task, method)
    assert all(torch.equal(getattr(network, n).weight, w) for n, w in before.items())
    assert len(network.again.weight.unique()) <= method.closing(network)["different"] * 9
