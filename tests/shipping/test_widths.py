"""latency_target: widths by the clock, whatever the table says, and the same again from a file."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import torchvision
from clock import Clock
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fpgm
from fpgm.errors import BudgetError
from fpgm.graph.groups import Group, prunable
from fpgm.graph.owners import channels
from fpgm.graph.trace import trace
from fpgm.pruning.latency import Latency, find
from fpgm.selection.rule import Rule
from fpgm.selection.zero import pruned
from fpgm.shipping import timetable, widths
from fpgm.shipping.knapsack import widths_within
from fpgm.shipping.lone import LAYERS, int8_model, onnx_model
from fpgm.shipping.runtimes import INT8, TARGETS, Target, package
from fpgm.shipping.timetable import Kind, Surface, TimeTable, envelope, fingerprint, kinds, levels
from fpgm.shipping.widths import Wanted, counts, found

TARGET = Target("torch", (3, 32, 32), 1, 1)


@given(arrays(float, (4, 5), elements=st.floats(0.1, 10)))
def test_a_narrower_layer_never_takes_longer(times) -> None:
    least = envelope(times)
    assert (np.diff(least, axis=0) >= 0).all()
    assert (np.diff(least, axis=1) >= 0).all()
    assert (least <= times).all()
    assert np.array_equal(envelope(least), least)


@pytest.mark.parametrize(
    ("filters", "align"), [(64, 8), (64, 1), (16, 8), (512, 16), (7, 8), (1, 1)]
)
def test_few_widths_are_timed_and_the_widest_and_the_narrowest_are_among_them(
    filters: int, align: int
) -> None:
    timed = levels(filters, align)
    assert timed[-1] == filters
    assert timed[0] <= align
    assert len(timed) <= timetable.LEVELS + 2
    assert all(width % align == 0 or width == filters for width in timed)


def asked(model, residual: str = "shared", share: float = 0.5, align: int = 8):
    groups = prunable(trace(model), residual).groups
    scores = [torch.linspace(1, 2, len(group), dtype=torch.float64) for group in groups]
    return groups, scores, Wanted(share, TARGET, align, 0.1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("overhead", [1.0, 1.3])
def test_the_network_takes_the_time_it_is_to_take(
    share: float, overhead: float, monkeypatch
) -> None:
    """Also where a pruned network takes longer than its layers do: the clock corrects the table."""
    Clock(monkeypatch, lambda left: overhead if left < 0.99 else 1.0)
    model = fpgm.model("resnet20")
    groups, scores, wanted = asked(model, share=share)
    result = found(model, groups, scores, wanted, TimeTable({}))
    assert abs(result.share / share - 1) <= widths.TOLERANCE
    assert all(w % 8 == 0 for w in result.groups)
    assert result.rounds[-1]["measured_ms"] == pytest.approx(result.measured)


def test_a_time_that_no_width_gives_is_refused_with_the_least_that_is_there(monkeypatch) -> None:
    Clock(monkeypatch, lambda left: 0.9 / left if left < 0.99 else 1.0)  # nothing helps
    model = fpgm.model("resnet20")
    groups, scores, wanted = asked(model)
    with pytest.raises(
        BudgetError, match=r"latency_target=0.5: .* the least is latency_target=0.9"
    ):
        found(model, groups, scores, wanted, TimeTable({}))


def test_the_whole_time_prunes_nothing(monkeypatch) -> None:
    Clock(monkeypatch)
    model = fpgm.model("resnet20")
    groups, scores, wanted = asked(model, share=1.0)
    assert found(model, groups, scores, wanted, TimeTable({})).groups == tuple(map(len, groups))


@settings(max_examples=25)
@given(arrays(float, (3, 4), elements=st.floats(0, 10)), st.sampled_from([1.0, 1e3]))
def test_scores_that_compare_over_layers_are_added_up(scores, scale: float) -> None:
    """Against every choice there is: the most that a network of this time can keep."""
    groups = [Group(((f"conv{layer}", torch.arange(4)),)) for layer in range(3)]
    rows = [
        torch.from_numpy(row) * (scale if layer == 0 else 1) for layer, row in enumerate(scores)
    ]
    options, cost = [[1, 2, 3, 4]] * 3, [3, 2, 1]
    values = widths._sums(groups, rows, options)

    def kept(chosen) -> float:
        return sum(float(row.sort().values[-w:].sum()) for row, w in zip(rows, chosen, strict=True))

    def times(chosen) -> float:
        return sum(1000 * each * w for each, w in zip(cost, chosen, strict=True))

    best = widths_within(14_000, options, values, times)
    assert times(best) <= 14_000
    most = max(kept(c) for c in itertools.product(*options) if times(c) <= 14_000)
    assert kept(best) == pytest.approx(most, rel=1e-6, abs=1e-6)


def test_one_ranking_takes_from_the_layers_that_are_worth_little(tmp_path, monkeypatch) -> None:
    """By layer the scale of a layer's scores says nothing, over the network everything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Clock(monkeypatch)
    model = fpgm.model("resnet20")
    groups, scores, _ = asked(model, "inner")
    dear = [
        s * (1000 if g.members[0][0] == "layer1.0.conv1" else 1) - 5
        for g, s in zip(groups, scores, strict=True)
    ]
    place = [group.members[0][0] for group in groups].index("layer1.0.conv1")
    latency = Latency(0.6, TARGET, tmp_path / "run")
    by_layer = find(model, groups, dear, latency, Rule(align=4), print)
    together = find(model, groups, dear, latency, Rule(scope="global", align=4), print)
    assert by_layer.groups[place] < 16 == together.groups[place]
    assert abs(together.share / 0.6 - 1) <= widths.TOLERANCE


def test_filters_that_save_no_time_are_named(monkeypatch) -> None:
    """Widths below 16 take what 16 takes: nobody goes below it."""
    monkeypatch.setattr("clock.macs", lambda k, i, o: max(i, 16) * max(o, 16))
    Clock(monkeypatch)
    model = fpgm.model("resnet20")
    groups, scores, wanted = asked(model, share=0.6)
    result = found(model, groups, scores, wanted, TimeTable({}))
    inner = [g.members[0][0] for g in groups].index("layer1.0.conv1")
    assert result.groups[inner] == 16
    assert result.free["layer1.0.conv1"] == 8


@pytest.mark.parametrize("residual", ["independent", "shared", "inner"])
@pytest.mark.parametrize("name", ["resnet20", "mobilenet", "densenet"])
def test_the_table_is_asked_for_the_widths_that_the_compact_network_has(
    name: str, residual: str
) -> None:
    """What each layer of the compact network reads and writes is what `channels` says, but where
    several groups write a stream: there it may be narrower."""
    model = {
        "resnet20": lambda: fpgm.model("resnet20"),
        "mobilenet": lambda: torchvision.models.mobilenet_v2(num_classes=10),
        "densenet": lambda: fpgm.model("densenet40"),
    }[name]()
    graph = trace(model)
    groups = prunable(graph, residual).groups
    kept = [max(1, len(group) // 2) for group in groups]
    keep: dict[str, list[torch.Tensor]] = {}
    for group, width in zip(groups, kept, strict=True):
        for layer, filters in group.members:
            keep.setdefault(layer, []).append(filters[:width])
    small = fpgm.compact(model, {n: torch.cat(parts).sort().values for n, parts in keep.items()})
    for layer, sides in channels(graph, groups).items():
        conv = small.get_submodule(layer)
        reads, writes = (fixed + sum(e * kept[g] for g, e in of) for fixed, of in sides)
        assert round(writes) == conv.out_channels
        assert round(reads) >= conv.in_channels
        if residual == "shared":
            assert round(reads) == conv.in_channels


def test_a_run_that_starts_anew_measures_nothing_and_chooses_the_same(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clock, model, said = Clock(monkeypatch), fpgm.model("resnet20"), []
    groups, scores, _ = asked(model)
    latency = Latency(0.5, TARGET, tmp_path / "run")
    first = find(model, groups, scores, latency, Rule(align=8), said.append)
    before = clock.networks, clock.layers
    again = find(model, groups, scores, latency, Rule(align=8), said.append)
    assert (clock.networks, clock.layers) == before
    assert again == first
    elsewhere = Latency(0.5, TARGET, tmp_path / "other")  # the same machine: its times are known
    assert find(model, groups, scores, elsewhere, Rule(align=8), said.append) == first
    assert not said


def test_a_table_of_another_machine_is_not_believed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clock, model, said = Clock(monkeypatch), fpgm.model("resnet20"), []
    groups, scores, _ = asked(model)
    theirs = tmp_path / "theirs.json"
    TimeTable({**fingerprint(TARGET), "processor": "Z80"}, {"x": 1.0}).save(theirs)
    find(model, groups, scores, Latency(0.5, TARGET, tmp_path, theirs), Rule(align=8), said.append)
    assert clock.layers > 0
    assert said == [said[0]]
    assert "theirs.json: was measured elsewhere (processor Z80, here" in said[0]
    assert "measured again" in said[0]
    theirs.write_text("no table")
    table, problem = timetable.read(theirs, TARGET)
    assert not table.ms
    assert problem is not None


def test_what_was_measured_is_in_the_file(tmp_path) -> None:
    path = tmp_path / "deep" / "table.json"
    TimeTable(fingerprint(TARGET), {"conv": 1.5}).save(path)
    assert json.loads(path.read_text())["ms"] == {"conv": 1.5}
    table, problem = timetable.read(path, TARGET)
    assert (table.ms, problem) == ({"conv": 1.5}, None)


@pytest.mark.parametrize("runtime", sorted(LAYERS))
def test_a_lone_layer_runs_in_every_runtime_that_is_installed(runtime: str) -> None:
    pytest.importorskip(package(runtime))
    if package(runtime) == "openvino":
        pytest.skip("only in a process of its own: the test below")
    conv = Kind((3, 3), (2, 2), (1, 1), (1, 1), False, (9, 9)).layer(5, 7)
    LAYERS[runtime](conv, (9, 9), 2, 1)(None)


def test_the_lone_layer_of_onnx_is_the_layer() -> None:
    ort = pytest.importorskip("onnxruntime")
    conv = Kind((3, 3), (2, 2), (1, 1), (1, 1), True, (9, 9)).layer(6, 6)
    x = torch.randn(2, 6, 9, 9)
    session = ort.InferenceSession(onnx_model(conv, (9, 9), 2), providers=["CPUExecutionProvider"])
    out = session.run(None, {"images": x.numpy()})[0]
    assert np.abs(out - conv(x).relu().detach().numpy()).max() < 1e-5


def test_the_lone_layer_in_int8_is_the_layer_and_is_run_in_int8(tmp_path) -> None:
    """Left to itself the runtime would convert to float and back, and the clock say nothing."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    conv = Kind((3, 3), (2, 2), (1, 1), (1, 1), False, (9, 9)).layer(6, 7)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as_run.onnx")
    session = ort.InferenceSession(
        int8_model(conv, (9, 9), 2), options, providers=["CPUExecutionProvider"]
    )
    x = torch.randint(256, (2, 6, 9, 9), dtype=torch.uint8)
    out = session.run(None, {"images": x.numpy()})[0]
    assert out.dtype == np.uint8
    expected = conv(x / 255).relu().clamp(max=4).detach().numpy()
    assert np.abs(out * (4 / 255) - expected).max() < 4 / 255  # half a step, and its weights'
    run = [node.op_type for node in onnx.load(tmp_path / "as_run.onnx").graph.node]
    assert "QLinearConv" in run
    assert "Conv" not in run


@pytest.mark.parametrize("silent", [False, True])
def test_a_schedule_that_leaves_no_constants_is_timed_without_them(
    silent: bool, tmp_path, monkeypatch
) -> None:
    """Else what they take is taken off the widths, and the network is faster than asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Clock(monkeypatch)
    timed, model = [], fpgm.model("resnet20")
    both = widths._both

    def seen(network, keep, *given) -> tuple[float, float]:
        timed.append((network, keep))
        return both(network, keep, *given)

    monkeypatch.setattr(widths, "_both", seen)
    groups, scores, _ = asked(model)
    latency = Latency(0.5, TARGET, tmp_path / "run")
    find(model, groups, scores, latency, Rule(align=8), print, silent)
    network, keep = timed[-1]
    mask = pruned(network, keep)["layer3.0.conv1"]
    assert mask.any()
    assert bool(network.layer3[0].bn1.bias[mask].any()) is not silent
    assert network.layer3[0].bn1.weight[~mask].any()
    assert model.layer3[0].bn1.weight.all()  # the run's own stays as it is


def test_surface_goes_through_what_was_timed_and_stays_monotone() -> None:
    kind = Kind((1, 1), (1, 1), (0, 0), (1, 1), False, (4, 4))
    ms = {kind.key(i, o): i * o / 1e3 for i in (8, 16) for o in (8, 32)}
    surface = Surface(kind, [8, 16], [8, 32], TimeTable({}, ms))
    assert surface(8, 8) == 64
    assert surface(16, 32) == 512
    assert surface(12, 20) == pytest.approx(12 * 20)  # bilinear


def test_kinds_know_the_pixels_that_each_layer_reads() -> None:
    found_kinds = kinds(trace(fpgm.model("resnet20")), (3, 32, 32))
    assert found_kinds["layer2.0.conv1"].image == (32, 32)
    assert found_kinds["layer2.0.conv2"].image == (16, 16)
    assert found_kinds["layer3.2.conv2"].image == (8, 8)


def test_layers_of_several_groups_add_up() -> None:
    groups = prunable(trace(fpgm.model("resnet20")), "shared").groups
    full = counts(groups, [len(group) for group in groups])
    assert (full["conv1"], full["layer2.0.conv2"], full["layer3.0.conv2"]) == (16, 32, 64)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", sorted(TARGETS))
def test_widths_are_found_in_every_runtime(runtime: str, tmp_path, monkeypatch) -> None:
    """On the real clock, which is disturbed here: 0.7 of the time, give or take a quarter. In int8
    narrow layers may take as long as wide ones, which is then said."""
    pytest.importorskip(package(runtime))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, said = fpgm.model("resnet20"), []
    groups, scores, _ = asked(model)
    latency = Latency(0.7, Target(runtime, (3, 32, 32), 32, 1), tmp_path / "run")
    try:
        result = find(model, groups, scores, latency, Rule(align=8), said.append)
    except BudgetError as refused:
        if runtime.endswith(INT8) and f"ms in {runtime} with target_batch=32" in str(refused):
            return
        raise
    assert 0.52 < result.share < 0.88
    assert (tmp_path / "run" / "latency_table.json").exists()
