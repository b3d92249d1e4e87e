"""Every criterion and every method, by being in the list: trained, cut short, resumed, shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_networks import resnet8
from tasks import cut_short, few, made, whole
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpgm.criteria import CRITERIA
from fpgm.methods import METHODS, Goal, Schedule
from fpgm.selection.rule import Rule

__all__ = ["few"]  # a fixture
pytestmark = pytest.mark.usefixtures("few")

SCHEDULES = sorted(name for name, method in METHODS.items() if issubclass(method, Schedule))
BESIDE = sorted(name for name, method in METHODS.items() if not issubclass(method, Schedule))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network whose scales are no longer all 1."""
    path = tmp_path_factory.mktemp("trained") / "w.pt"
    torch.manual_seed(0)
    model = resnet8(10, 1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    torch.save(model.state_dict(), path)
    return f"pretrained={path}"


SMALL = ("arch=own", "arch.build=own_networks:resnet8")


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key != "timing"}


def histograms(directory: Path) -> dict[tuple[str, int], bytes]:
    """What TensorBoard shows of the scores, by layer and epoch; of one written twice the last."""
    found = {}
    # File by file: their names end in a count of the process, and 10 sorts before 9.
    for file in sorted(directory.glob("events.*"), key=_written):
        events = EventAccumulator(str(file), size_guidance={"histograms": 0})
        events.Reload()
        for tag in events.Tags()["histograms"]:
            for event in events.Histograms(tag):
                found[tag, event.step] = str(event.histogram_value)
    return found


def _written(file: Path) -> tuple[int, int]:
    """When, in seconds, and as which of its process."""
    parts = file.name.split(".")
    return int(parts[3]), int(parts[-1])


def resumes_and_ships(where: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    words = (*SMALL, *words)
    report = whole(where / "whole", *words)
    cut_short(where / "cut", monkeypatch, *words)
    assert numbers(whole(where / "cut", *words)) == numbers(report)
    assert histograms(where / "cut") == histograms(where / "whole")
    assert report["pruning"]["pruned_filters"] > 0 or "rate=0" in words
    same = report["equivalence"]
    assert same["max_abs_diff"] <= 1e-5 * same["max_abs_logit"]
    assert same["agreement"] == 1
    return report


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_trains_resumes_to_the_bit_and_ships_an_equal_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str
) -> None:
    few_batches = ["criterion.batches=1"] if CRITERIA[name].reads_images else []
    words = [f"criterion={name}", "schedule=soft", baseline, *few_batches]
    report = resumes_and_ships(tmp_path, monkeypatch, *words)
    assert report["config"]["criterion"]["name"] == name


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_trains_resumes_to_the_bit_and_ships_an_equal_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str
) -> None:
    start = [baseline] if METHODS[name].problems(Goal(Rule(), 0.4), from_scratch=True) else []
    words = [f"schedule={name}", "schedule.recalibrate=1", *start]
    report = resumes_and_ships(tmp_path, monkeypatch, *words)
    assert report["config"]["schedule"]["name"] == name


@pytest.mark.parametrize("name", BESIDE)
def test_every_method_beside_a_schedule_resumes_to_the_bit_and_ships_an_equal_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str
) -> None:
    unpruned = ["rate=0"] if METHODS[name].problems(Goal(Rule(), 0.4), from_scratch=False) else []
    report = resumes_and_ships(tmp_path, monkeypatch, f"method={name}", baseline, *unpruned)
    assert name in report["config"]["method"]
    plain = whole(tmp_path / "plain", *SMALL, "schedule.train_compact=false", baseline, *unpruned)
    assert plain["accuracy"] != report["accuracy"] or plain["equivalence"] != report["equivalence"]


def test_slimming_shrinks_the_scales(tmp_path: Path) -> None:
    sums = []
    for words in ((), ("method=slimming", "method.slimming.strength=0.1")):
        where = tmp_path / str(len(words))
        whole(where, *words)
        state = torch.load(where / "zeroed.pt", weights_only=True)["state_dict"]
        sums.append(sum(v.abs().sum() for k, v in state.items() if "bn" in k and "weight" in k))
    assert sums[1] < 0.95 * sums[0]


@pytest.mark.parametrize(
    "words",
    [
        ("criterion=gm", "residual=shared", "align=8", "macs_target=0.4"),
        ("criterion=l2", "scope_norm=none", "floor=0.25", "rate=0.6"),
    ],
    ids=lambda words: words[0],
)
def test_one_ranking_over_the_network_is_honoured_to_the_end(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    r = whole(tmp_path / "r", "scope=global", "epochs=1", *words)
    c = r["config"]
    layers = [layer for layer in r["layers"] if layer["name"] != "fc"]
    assert r["pruning"]["churn"] == [0]
    assert r["reduction"]["paper_macs"] is None
    assert len({layer["kept"] / layer["filters"] for layer in layers}) > 1 or c["align"] > 1
    assert all(layer["kept"] >= c["floor"] * layer["filters"] for layer in layers)
    assert all(layer["kept"] % c["align"] == 0 for layer in layers)
    if c["macs_target"]:
        assert r["compact"]["macs"] <= c["macs_target"] * r["dense"]["macs"]
    at_floor = [layer["name"] for layer in layers if layer["kept"] == c["floor"] * layer["filters"]]
    if c["align"] == 1:
        assert r["pruning"]["collapsed"] == at_floor
    text = (tmp_path / "r" / "report.md").read_text()
    assert ("pruned down to the floor" in text) == bool(r["pruning"]["collapsed"])


def test_the_same_images_without_augmentation_are_shown_at_every_selection(tmp_path: Path) -> None:
    task = made(tmp_path, "criterion=taylor", "criterion.batches=2", "schedule=printed")
    first, second = (list(task.shown()) for _ in range(2))
    assert len(first) == 2
    images = task.images
    plain = {image.numpy().tobytes() for image in images.normalise(images.train_images)}
    for (a, labels), (b, again) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels, again)
        assert {image.numpy().tobytes() for image in a} <= plain


def test_epochs_are_not_the_same_pass_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch has an order and an augmentation of its own, and another seed has others."""
    import fpgm.training.loop as loop

    seen: list[torch.Tensor] = []
    step = loop.step

    def watched(task: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.clone())
        return step(task, inputs, labels)

    monkeypatch.setattr(loop, "step", watched)
    for seed in (0, 1):
        task = made(tmp_path, "schedule=printed", f"seed={seed}")
        for epoch in range(2):
            loop.train_epoch(task, epoch)
    firsts = seen[::2]
    assert len(firsts) == 4
    assert len({first.numpy().tobytes() for first in firsts}) == 4
