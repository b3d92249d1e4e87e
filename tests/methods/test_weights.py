"""Single weights: as many as asked for, the least of them, and they stay where they are."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import Noise, few, steps, whole
from torch import nn
from torch.nn.utils import prune

import fpgm
from fpgm.methods.beside.weights import Weights, grown, largest, sparsity
from fpgm.methods.schedules.papers import Frozen, Soft
from fpgm.networks.weights import weights_of

__all__ = ["few"]  # a fixture
# Few values: ties.
VALUES = st.lists(st.lists(st.integers(-4, 4), min_size=1, max_size=12), min_size=1, max_size=4)


@given(VALUES, st.floats(0, 0.99), st.sampled_from(["layer", "global"]))
def test_the_least_weights_go_and_exactly_so_many(
    values: list[list[int]], rate: float, scope: str
) -> None:
    weights = {str(i): torch.tensor(own, dtype=torch.float32) for i, own in enumerate(values)}
    kept = largest(weights, rate, scope)
    sets = [[name] for name in weights] if scope == "layer" else [list(weights)]
    for names in sets:
        places = [(n, i) for n in names for i in range(len(weights[n]))]
        order = sorted(places, key=lambda at: abs(weights[at[0]][at[1]].item()))  # stable
        gone = {at for at in places if kept[at[0]][at[1]] == 0}
        assert gone == set(order[: int(len(places) * rate + 1e-9)])
    once = {name: weight * kept[name] for name, weight in weights.items()}
    again = largest(once, rate, scope)
    assert all(torch.equal(once[name] * again[name], once[name]) for name in once)


@given(st.integers(0, 2**31), st.sampled_from(["layer", "global"]))
def test_without_ties_they_are_those_of_torchs_own_pruning(seed: int, scope: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    linears = [nn.Linear(6, 3), nn.Linear(3, 4)]
    for linear in linears:
        linear.weight.data = torch.randn(linear.weight.shape, generator=generator)
    weights = {str(i): linear.weight.detach().clone() for i, linear in enumerate(linears)}
    kept = largest(weights, 0.5, scope)
    if scope == "layer":
        for linear in linears:
            prune.l1_unstructured(linear, "weight", linear.weight.numel() // 2)
    else:
        total = sum(linear.weight.numel() for linear in linears)
        both = [(linear, "weight") for linear in linears]
        prune.global_unstructured(both, prune.L1Unstructured, amount=total // 2)
    for i, linear in enumerate(linears):
        assert torch.equal(kept[str(i)], linear.weight_mask)


def zeros(network: nn.Module) -> dict[str, int]:
    kinds = (nn.Conv2d, nn.Linear)
    found = {n: m.weight for n, m in network.named_modules() if isinstance(m, kinds)}
    return {name: int((weight == 0).sum()) for name, weight in found.items()}


def size(network: nn.Module) -> dict[str, int]:
    kinds = (nn.Conv2d, nn.Linear)
    return {n: m.weight.numel() for n, m in network.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("growth", [0.0, 0.5, 1.0])
def test_the_share_grows_to_the_one_asked_for_and_pruned_weights_do_not_move(growth: float) -> None:
    task = Noise(rate=0.0, epochs=4, model=fpgm.model("resnet20").train())
    method = Weights(task, rate=0.7, scope="layer", growth=growth)  # type: ignore[arg-type]
    shares = [method.share(done) for done in range(4)]
    assert shares == sorted(shares)
    assert shares[-1] == 0.7
    assert (shares[0] == 0.7) == (growth == 0)
    steps(task, Frozen(task), method)
    total = size(task.full.network)
    assert zeros(task.full.network) == {n: int(0.7 * count + 1e-9) for n, count in total.items()}


def test_the_curve_is_that_of_zhu_and_gupta() -> None:
    assert [grown(t) for t in (0, 0.5, 1)] == [0, 0.875, 1]


def test_one_ranking_over_the_network_counts_over_the_network() -> None:
    task = Noise(rate=0.0, epochs=1)
    with torch.no_grad():
        task.full.network.conv1.weight.mul_(1e-6)
    Weights(task, rate=0.1, scope="global", growth=0.0).start()
    found, total = zeros(task.full.network), size(task.full.network)
    assert sum(found.values()) == int(0.1 * sum(total.values()))
    assert found["conv1"] == total["conv1"]


@pytest.mark.usefixtures("few")
def test_the_report_says_that_only_a_compressed_file_gets_smaller(tmp_path: Path) -> None:
    words = ("rate=0", "method=weights", "method.weights.rate=0.9", "method.weights.growth=0")
    report = whole(tmp_path / "s", *words)
    dense = whole(tmp_path / "d", "rate=0")
    closing = report["methods"]["weights"]
    assert closing["zero"] == int(0.9 * closing["weights"])
    assert report["compact"]["macs"] == dense["compact"]["macs"]
    network = fpgm.load(tmp_path / "s" / "compact.pt")
    raw = b"".join(v.numpy().tobytes() for _, v in sorted(network.state_dict().items()))
    assert closing["bytes"] == len(raw)
    assert closing["compressed"] == len(zlib.compress(raw, 9))
    assert (
        closing["compressed"]
        < 0.4 * sparsity(fpgm.load(tmp_path / "d" / "compact.pt"))["compressed"]
    )
    assert "the same MACs and milliseconds" in (tmp_path / "s" / "report.md").read_text()


@pytest.mark.usefixtures("few")
def test_weights_go_beside_filters(tmp_path: Path) -> None:
    report = whole(tmp_path / "r", "rate=0.4", "method=weights", "method.weights.rate=0.9")
    assert report["pruning"]["pruned_filters"] > 0
    zero, total = (report["methods"]["weights"][key] for key in ("zero", "weights"))
    assert 0.3 < zero / total < 0.9  # of what is left: filters of zeros count at full width
    assert report["equivalence"]["agreement"] == 1


def test_filters_of_a_soft_schedule_still_grow_back() -> None:
    revived = []
    for beside in (False, True):
        task = Noise(rate=0.4, epochs=3)
        methods = [Weights(task, rate=0.5, growth=0.0)] if beside else []
        rows = steps(task, Soft(task, zero_at_start=False), *methods)
        revived.append([row["revived"] for row in rows])
    assert revived[1][1] > 0.8 * revived[0][1] > 0


def test_zeros_have_no_sign_and_a_layer_that_is_lost_is_named() -> None:
    task = Noise(rate=0.0, epochs=2)
    with torch.no_grad():
        task.full.network.conv1.weight.mul_(1e-6)
    steps(task, Frozen(task), Weights(task, rate=0.5, scope="global", growth=0.0))
    for weight in weights_of(task.full.network).values():
        assert not weight[weight == 0].signbit().any()
    assert any("nothing of conv1 is left" in line for line in task.warnings)
