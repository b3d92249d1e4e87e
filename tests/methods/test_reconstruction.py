"""Least squares: what stays makes up for what has gone, and never at a loss."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tasks import Noise, few, whole
from torch import Tensor, nn
from zoo import FAMILIES, randomised

import fpgm
from fpgm.criteria.evidence import look
from fpgm.criteria.views.contributions import sampled
from fpgm.criteria.views.readers import readers
from fpgm.criteria.views.view import Collector
from fpgm.errors import Error
from fpgm.graph.trace import trace
from fpgm.loops.task import LoopTask
from fpgm.methods import METHODS, Goal, Schedule
from fpgm.methods.beside.reconstruction import Reconstruction, hearing, solution
from fpgm.selection.rule import Rule

__all__ = ["few"]  # a fixture

MATRIX = arrays("float64", (12, 6), elements=st.integers(-9, 9))
GONE = arrays("bool", 6).filter(lambda gone: gone.any() and not gone.all())


class Trained(Noise):
    """A task that starts from the network it is given."""

    def __init__(self, model: nn.Module, schedule: str = "hard", rate: float = 0.4, **more) -> None:
        super().__init__(more.pop("rule", None), rate, model=model, from_scratch=False, **more)
        self._given = copy.deepcopy(model)
        g = torch.Generator().manual_seed(3)
        self._batches = [
            (torch.randn(16, *self.image_shape, generator=g), torch.zeros(16).long()) for _ in "abc"
        ]
        kind = METHODS[schedule]
        assert issubclass(kind, Schedule)
        self.schedule = kind(self)

    def given(self) -> nn.Module:
        return copy.deepcopy(self._given)

    def begun(self) -> Reconstruction:
        method = Reconstruction(self, batches=3)
        self.schedule.start()
        method.start()
        return method


def live(model: nn.Module) -> nn.Module:
    """Filters that are pruned say something: a constant that least squares must not rely on."""
    return randomised(model, 0).train()


@given(MATRIX, GONE)
def test_factors_are_those_of_least_squares(x: np.ndarray, gone: np.ndarray) -> None:
    kept = x[:, ~gone]
    factors, before, after = solution(torch.from_numpy(x.T @ x), torch.from_numpy(gone))
    best, *_ = np.linalg.lstsq(kept, x.sum(1), rcond=None)
    error = float(((kept @ best - x.sum(1)) ** 2).sum())
    mine = float(((x @ factors.numpy() - x.sum(1)) ** 2).sum())
    whole = float((x.sum(1) ** 2).sum())
    assert mine == pytest.approx(error, abs=1e-6 * (1 + float((x**2).sum())))
    assert after * whole == pytest.approx(mine, abs=1e-6 * (1 + whole))
    assert after <= before + 1e-9
    assert not factors.numpy()[gone].any()
    if np.linalg.matrix_rank(kept) == kept.shape[1]:
        np.testing.assert_allclose(factors.numpy()[~gone], best, rtol=1e-5, atol=1e-5)


@given(MATRIX, GONE)
def test_what_said_nothing_leaves_the_others_as_they_are(x: np.ndarray, gone: np.ndarray) -> None:
    x[:, gone] = 0
    factors, before, after = solution(torch.from_numpy(x.T @ x), torch.from_numpy(gone))
    np.testing.assert_array_equal(factors.numpy(), (~gone).astype(float))
    assert before == after == 0


def test_of_two_that_say_the_same_the_one_that_stays_speaks_for_both() -> None:
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double()
    x[:, 1] = x[:, 4]
    gone = torch.tensor([False, True, False, False, False])
    factors, before, after = solution(x.T @ x, gone)
    torch.testing.assert_close(factors, torch.tensor([1.0, 0, 1, 1, 2]).double())
    assert before > 0.05 > 1e-12 > after


class Responses(Collector):
    """What layers answer at sampled positions, without bias, by what they are given."""

    def __init__(self, graph, names: list[str], outputs: dict[str, Tensor]) -> None:
        self.read = {r.node: r for r in readers(graph) if r.name in names}
        self.entered, self.found, self.outputs = frozenset(self.read), {}, outputs

    def enter(self, node, value: Tensor) -> None:
        reader, g = self.read[node], torch.Generator().manual_seed(11)
        x = sampled(reader, value, 10, self.outputs[reader.name], g)
        self.found.setdefault(reader.name, []).append(x.sum(1))


def answers(model: nn.Module, task: Trained, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    graph = trace(model)
    collector = Responses(graph, list(outputs), outputs)
    look(model, graph, collector, task.batches(3))
    return {name: torch.cat(parts) for name, parts in collector.found.items()}


def inner(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("conv1") and "." in name]


@pytest.mark.parametrize("layer", ["layer1.0.conv1", "layer1.2.conv1", "layer2.1.conv1"])
def test_the_next_layer_answers_more_nearly_as_it_did(layer: str) -> None:
    """Through the real network, dense, silenced and rescaled; at other samples than were solved
    for, of the same images."""
    dense = live(fpgm.model("resnet20"))
    rule = Rule("l1", rates={layer: 0.5})
    reader = layer.replace("conv1", "conv2")

    task = Trained(copy.deepcopy(dense), rate=0.0, rule=rule)
    method = task.begun()
    network = task.full.network
    outputs = {reader: torch.arange(len(dense.get_submodule(reader).weight))}
    silent = copy.deepcopy(network)  # the same with factors of 1
    kept = task.schedule.keep[layer]
    with torch.no_grad():
        weight = silent.get_submodule(reader).weight
        weight[:, kept] = dense.get_submodule(reader).weight[:, kept]
    whole, plain, rescaled = (answers(m, task, outputs)[reader] for m in (dense, silent, network))
    without, with_ = ((a - whole).square().sum() for a in (plain, rescaled))
    assert with_ < without
    assert set(method._lost) == {reader}
    assert method._lost[reader][1] < method._lost[reader][0]


def test_on_the_very_samples_the_error_is_what_the_method_says_and_never_more() -> None:
    dense = live(fpgm.model("resnet20"))
    for layer in inner(dense):
        rule, reader = Rule("l1", rates={layer: 0.5}), layer.replace("conv1", "conv2")
        task = Trained(copy.deepcopy(dense), rate=0.0, rule=rule)
        method = task.begun()
        graphs = [trace(network) for network in (dense, task.full.network)]
        sums: list[Tensor] = []
        for model, graph in zip((dense, task.full.network), graphs, strict=True):
            collector = Seeded(graph, [reader], {reader: torch.arange(64)})
            collector.outputs = {reader: torch.arange(len(dense.get_submodule(reader).weight))}
            look(model, graph, collector, task.batches(3))
            sums.append(torch.cat(collector.found[reader]))
        error = float((sums[1] - sums[0]).square().sum() / sums[0].square().sum())
        before, after = method._lost[reader]
        assert error == pytest.approx(after, rel=1e-3, abs=1e-6)
        assert after <= before


class Seeded(Responses):
    """At the samples that the method draws."""

    def enter(self, node, value: Tensor) -> None:
        reader = self.read[node]
        batch = len(self.found.get(reader.name, ()))
        g = torch.Generator().manual_seed(zlib.crc32(f"{reader.name}/{batch}".encode()))
        x = sampled(reader, value, 10, self.outputs[reader.name], g)
        self.found.setdefault(reader.name, []).append(x.sum(1))


def test_what_has_gone_says_nothing_any_more() -> None:
    """Not even the constant that a BatchNorm makes of a filter of zeros."""
    task = Trained(live(fpgm.model("resnet20")), rule=Rule("l1"))
    task.begun()
    network, name = task.full.network.eval(), "layer1.0.conv1"
    gone = [i for i in range(16) if i not in task.schedule.keep[name].tolist()]
    assert len(gone) == 6
    heard: list[Tensor] = []
    network.layer1[0].conv2.register_forward_pre_hook(lambda m, x: heard.append(x[0]))
    with torch.no_grad():
        network(torch.randn(4, *task.image_shape))
    assert not heard[0][:, gone].any()
    assert heard[0][:, task.schedule.keep[name]].any()
    assert not network.layer1[0].bn1.bias[gone].any()
    assert not network.layer1[0].conv2.weight[:, gone].any()


def test_a_zero_filter_that_goes_changes_no_other_weight() -> None:
    model = live(fpgm.model("resnet20"))
    name = "layer2.0.conv1"
    with torch.no_grad():
        model.get_submodule(name).weight[:4] *= 1e-6  # the smallest, and alive
        for norm in (model.layer2[0].bn1.weight, model.layer2[0].bn1.bias):
            norm[:4] = 0
    before = copy.deepcopy(model)
    task = Trained(model, rate=0.0, rule=Rule("l1", rates={name: 0.125}))
    task.begun()
    weight = task.full.network.layer2[0].conv2.weight
    assert torch.equal(weight[:, 4:], before.layer2[0].conv2.weight[:, 4:])


def test_of_two_equal_filters_the_other_is_doubled() -> None:
    model = live(fpgm.model("resnet20"))
    conv, norm = model.layer2[0].conv1, model.layer2[0].bn1
    with torch.no_grad():
        conv.weight[1] = conv.weight[7] * 1e-3  # as BatchNorm makes it, the same; and smaller
        for value in norm.state_dict().values():
            if value.dim():
                value[1] = value[7]
        norm.bias[:] = norm.bias.abs()
        norm.running_mean[[1, 7]] = 0
        norm.running_var[1] = norm.running_var[7] * 1e-6
        norm.eps = 1e-12
    before = copy.deepcopy(model)
    Trained(model, rate=0.0, rule=Rule("l1", rates={"layer2.0.conv1": 0.04})).begun()
    weight, old = model.layer2[0].conv2.weight, weight_of(before).clone()
    # The next layer reads the two by weights of its own: they add up only where these are equal.
    assert not weight[:, 1].any()
    with torch.no_grad():
        old[:, 1] = old[:, 7]
        before.layer2[0].conv2.weight.copy_(old)
    task = Trained(before, rate=0.0, rule=Rule("l1", rates={"layer2.0.conv1": 0.04}))
    task.begun()
    torch.testing.assert_close(weight_of(before)[:, 7], 2 * old[:, 7], rtol=1e-3, atol=1e-5)
    others = [c for c in range(32) if c not in (1, 7)]
    torch.testing.assert_close(weight_of(before)[:, others], old[:, others], rtol=1e-3, atol=1e-5)


def weight_of(model: nn.Module) -> Tensor:
    return model.layer2[0].conv2.weight.detach()


def test_layers_that_read_a_stream_stay_unless_a_channel_of_it_goes_whole() -> None:
    model = live(fpgm.model("resnet20"))
    task = Trained(copy.deepcopy(model), rule=Rule("l1"))
    task.begun()
    network = task.full.network
    for name in ("layer1.1.conv1", "fc"):
        assert torch.equal(
            network.get_submodule(name).weight.any(0), model.get_submodule(name).weight.any(0)
        )
    assert torch.equal(network.fc.weight, model.fc.weight)
    assert torch.equal(network.bn1.bias, model.bn1.bias)  # the stream goes on hearing of the stem
    assert "10 layers rescaled, layer1.0.conv1, layer1.0.conv2, " in task.said[-1]
    assert "; as they were, 9: layer1.1.conv1" in task.said[-1]

    task = Trained(copy.deepcopy(model), rule=Rule("l1"), residual="shared")
    task.begun()
    gone = [i for i in range(64) if i not in task.schedule.keep["layer3.2.conv2"].tolist()]
    assert len(gone) > 20
    assert not task.full.network.fc.weight[:, gone].any()
    kept = task.schedule.keep["layer3.2.conv2"]
    assert not torch.equal(task.full.network.fc.weight[:, kept], model.fc.weight[:, kept])
    assert "as they were" not in task.said[-1]


FAMILY: dict[str, Callable[[], nn.Module]] = {
    "vgg11": lambda: fpgm.model("vgg11"),
    "lenet5": lambda: fpgm.model("lenet5", in_channels=3),
    **{name: FAMILIES[name] for name in ("mobilenet_v2", "densenet", "shufflenet", "regnet")},
}


@pytest.mark.parametrize("name", FAMILY)
def test_any_network_computes_the_same_when_it_is_made_compact(name: str) -> None:
    torch.manual_seed(0)
    model = live(FAMILY[name]())
    image = {"vgg11": (3, 32, 32), "lenet5": (3, 28, 28)}.get(name, (3, 64, 64))

    class Sized(Trained):
        pass

    Sized.image = Sized.image_shape = image
    task = Sized(model, rule=Rule("l1"), residual="shared")
    method = task.begun()
    assert method._lost
    assert all(after <= before + 1e-9 for before, after in method._lost.values())
    network = task.full.network.eval()
    x = torch.randn(3, *image)
    small = fpgm.compact(network, task.schedule.keep, image=image)
    found = fpgm.equivalence(network, small, x)
    assert found["max_abs_diff"] <= 1e-4 * found["max_abs_logit"]


@pytest.mark.parametrize("schedule", ["soft", "asymptotic", "printed", "fade", "gated"])
def test_a_schedule_that_lets_filters_come_back_is_refused(schedule: str) -> None:
    known = {"printed": "soft"}.get(schedule, schedule)
    task = Trained(live(fpgm.model("resnet20")), known)
    if schedule == "printed":
        task.schedule = METHODS["soft"](task, zero_at_start=False)  # type: ignore[assignment]
    with pytest.raises(Error, match=f"^method=reconstruction: what schedule={known} prunes") as e:
        task.begun()
    assert "\n" not in str(e.value)


def test_from_scratch_it_names_pretrained() -> None:
    (line,) = Reconstruction.problems(Goal(Rule(), 0.4), from_scratch=True)
    assert line.startswith("method=reconstruction: keeps what a trained network computes, name it")
    assert Reconstruction.problems(Goal(Rule(), 0.4), from_scratch=False) == []


def test_few_samples_are_warned_of_and_nothing_to_do_is_said() -> None:
    task = Trained(live(fpgm.model("resnet20")), rule=Rule("l1"))
    method = Reconstruction(task, batches=1, positions=1)
    task.schedule.start()
    method.start()
    assert len(task.warnings) == 1
    assert "16 samples are few for the 39 channels that layer3.0.conv2 " in task.warnings[0]
    task = Trained(live(fpgm.model("resnet20")), rate=0.0)
    assert task.begun().closing(nn.Identity()) == {}
    assert task.said == ["reconstruction: no layer rescaled"]


def test_a_loop_of_ones_own_has_no_methods_beside_the_schedule() -> None:
    task = LoopTask.__new__(LoopTask)
    with pytest.raises(Error, match="go with fpgm-train"):
        _ = task.schedule


def test_a_run_keeps_more_of_its_accuracy_and_reports_the_error(
    tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(tmp_path / "base", "rate=0", "epochs=12")
    start = f"pretrained={tmp_path / 'base'}"
    words = ("epochs=0", "rate=0.3", "residual=inner", "criterion=l1", start, "schedule=hard")
    plain = whole(tmp_path / "plain", *words)
    helped = whole(tmp_path / "helped", *words, "method=reconstruction")
    assert helped["accuracy"]["compact_last"] >= plain["accuracy"]["compact_last"]
    told = helped["methods"]["reconstruction"]
    assert told["layers"] == 9
    assert told["lost_rescaled"] < told["lost"]


def test_what_a_layer_reads_is_told_apart() -> None:
    graph = trace(fpgm.model("resnet20"))
    some = torch.zeros(16, dtype=torch.bool)
    some[3] = True
    heard, left = hearing(graph, {"layer1.0.conv1": some})
    assert list(heard) == ["layer1.0.conv2"]
    assert heard["layer1.0.conv2"].gone.tolist() == some.tolist()
    assert left == {}
    heard, left = hearing(graph, {"layer3.2.conv2": torch.arange(64) < 2})
    assert heard == {}
    assert list(left) == ["fc"]
