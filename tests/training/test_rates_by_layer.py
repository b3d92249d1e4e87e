"""Rates by layer in whole runs: to the report, resumed to the bit, and shipped equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from clock import Clock
from tasks import cut_short, few, made, whole

from fpgm.errors import Error
from fpgm.shipping import widths

__all__ = ["few"]  # a fixture
pytestmark = pytest.mark.usefixtures("few")


def kept(report) -> dict[str, int]:
    return {layer["name"]: layer["kept"] for layer in report["layers"]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rates={layer1*: 0.5, conv1: 0}", "rate=0.25"],
         {"conv1": 16, "layer1.0.conv2": 8, "layer2.0.conv1": 24}),
        (["widths={layer3.*.conv1: 7}", "rate=0.5", "schedule=asymptotic"],
         {"layer3.1.conv1": 7, "conv1": 8}),
        (["ignore=[layer1*]", "rate=0.5", "residual=inner"],
         {"layer1.0.conv1": 16, "layer2.0.conv1": 16}),
        (["rounding=kept", "rate=0.3"], {"conv1": 11, "layer3.0.conv1": 44}),
        (["threshold=1.0", "criterion=l2", "schedule=soft"], {}),
        (["scope=isomorphic", "scope_cost=memory", "rate=0.4"], {}),
        (["macs_target=0.5", "rates={conv1: 0}"], {"conv1": 16}),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_layers_get_what_they_are_asked_to_and_runs_resume_to_the_bit(
    words: list[str], expected: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = whole(tmp_path / "whole", *words)
    cut_short(tmp_path / "cut", monkeypatch, *words)
    again = whole(tmp_path / "cut", *words)
    assert {k: v for k, v in again.items() if k != "timing"} == {
        k: v for k, v in report.items() if k != "timing"
    }
    assert {name: kept(report)[name] for name in expected} == expected
    assert report["pruning"]["pruned_filters"] > 0
    assert report["equivalence"]["agreement"] == 1
    if "macs_target=0.5" in words:
        assert report["compact"]["macs"] <= 0.5 * report["dense"]["macs"]


def test_the_closed_form_in_the_report_is_that_of_the_layers_own_rates(tmp_path: Path) -> None:
    even = whole(tmp_path / "even", "rate=0.5", "epochs=1")["reduction"]["paper_macs"]
    table = whole(tmp_path / "table", "rates={*: 0.5}", "rate=0.1", "epochs=1")
    assert table["reduction"]["paper_macs"] == pytest.approx(even)
    by_score = whole(tmp_path / "t", "threshold=1.0", "criterion=l2", "epochs=1")
    assert by_score["reduction"]["paper_macs"] is None  # no rate, no formula


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_of_time_is_met_reported_and_the_same_after_a_kill(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clock = Clock(monkeypatch, lambda left: 1.2 if left < 0.99 else 1.0)
    words = ["latency_target=0.5", "residual=shared", "align=4", f"scope={scope}"]
    report = whole(tmp_path / "whole", *words)
    timed = report["latency"]
    assert abs(timed["measured_ms"] / timed["dense_ms"] / 0.5 - 1) <= 0.05
    assert abs(timed["final"]["share"] / 0.5 - 1) <= 0.05
    assert timed["predicted_ms"] > 0
    text = (tmp_path / "whole" / "report.md").read_text()
    assert "latency_target 0.5 in torch, batch 1" in text
    assert "predicted" in text
    cut_short(tmp_path / "cut", monkeypatch, *words)
    before = clock.layers
    again = whole(tmp_path / "cut", *words)
    assert again["latency"] == timed
    assert kept(again) == kept(report)
    assert clock.layers == before
    assert all(count % 4 == 0 for name, count in kept(report).items() if name != "fc")


def test_a_file_of_rates_is_what_the_run_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    content = {"arch": "resnet20", "residual": "independent", "rates": {"conv1": 0.5, "*": 0.25}}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    report = whole(tmp_path / "r", f"rates={file}", "epochs=1")
    assert kept(report)["conv1"] == 8
    assert kept(report)["layer3.0.conv2"] == 48
    # The table itself is in the run's configuration: the file may change afterwards.
    assert report["config"]["rates"] == content["rates"]


@pytest.mark.parametrize(
    ("content", "words", "line"),
    [
        ({"arch": "vgg16", "rates": {"a": 0.1}}, [], "is for arch=vgg16, not arch=resnet20"),
        ({"residual": "shared", "rates": {"a": 0.1}}, [], "is for residual=shared, not"),
        ({"conv1": 0.1}, [], "has no table under `rates:`"),
        ({"rates": {"conv1": 1.5}}, [], "rates: conv1=1.5: must be at least 0 and below 1"),
        ({"rates": {"elsewhere": 0.5}}, [], "rates: elsewhere fits no layer; the layers are conv1"),
        (None, ["latency_target=0.5", "rates={conv1: 0.1}"], "rates says already how much"),
        (None, ["latency_target=0.5", "criterion=mix"], "is an order of pruning and says not what"),
        (
            None,
            ["latency_target=0.5", "scope=isomorphic"],
            "scope=isomorphic says already how much",
        ),
        (
            None,
            ["latency_target=0.5", "scope=global", "scope_cost=macs"],
            "scope_cost says already",
        ),
        (None, ["latency_target=0.5", "latency_table=nowhere.json"], "latency_table=nowhere.json"),
        (None, ["macs_target=0.5", "threshold=1"], "threshold says already how much goes"),
        (None, ["rates=nowhere.yaml"], "rates=nowhere.yaml: cannot be read"),
        (None, ["rates={conv1: x}"], "rates.conv1=x: must be a table of numbers"),
        (None, ["widths=[a]"], "must be whole numbers, a list or a table"),
        (None, ["widths=nowhere"], "widths=nowhere: no finished run"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    content, words: list[str], line: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "rates.yaml").write_text(yaml.safe_dump(content))
        words = [f"rates={tmp_path / 'rates.yaml'}"]
    with pytest.raises(Error) as error:
        made(tmp_path / "run", *words)
    assert line in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_control_takes_the_widths_of_another_run(tmp_path: Path) -> None:
    ours = whole(tmp_path / "ours", "scope=global", "macs_target=0.5", "epochs=1")
    words = (f"widths={tmp_path}/ours", "criterion=random", "epochs=1")
    control = whole(tmp_path / "control", *words)
    assert kept(control) == kept(ours)
    assert len(set(kept(ours).values())) > 3
    assert control["config"]["widths"]["layer1.0.conv1"] == kept(ours)["layer1.0.conv1"]
    with pytest.raises(Error, match="is for residual=independent, not residual=shared"):
        made(tmp_path / "other", *words, "residual=shared")
    whole(tmp_path / "dense", "rate=0", "epochs=1")
    with pytest.raises(Error, match="nothing is pruned there"):
        made(tmp_path / "other", f"widths={tmp_path}/dense")


@pytest.mark.parametrize(("schedule", "silent"), [("frozen", False), ("gated", True)])
def test_widths_are_timed_as_the_schedule_leaves_the_network(
    schedule: str, silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Clock(monkeypatch)
    asked, found = [], widths.found_apart

    def seen(*given):
        asked.append(given[3].silent)
        return found(*given)

    monkeypatch.setattr(widths, "found_apart", seen)
    words = ["latency_target=0.5", "residual=shared", "align=4", "epochs=1"]
    whole(tmp_path / "run", *words, f"schedule={schedule}")
    assert asked == [silent]


def test_a_runtime_that_is_not_installed_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpgm.shipping.runtimes.installed", lambda name: False)
    with pytest.raises(
        Error, match=r"target=openvino: openvino is not installed here: pip install"
    ):
        made(tmp_path / "run", "latency_target=0.5", "target=openvino")
