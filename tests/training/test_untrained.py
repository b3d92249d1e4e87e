"""What pruning alone costs a trained network, with and without the epochs that follow."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tasks import cut_short, few, made, whole

import fpgm
from fpgm.errors import Error
from fpgm.report.collect import read
from fpgm.training.evaluate import accuracy, logits
from fpgm.training.loop import COLUMNS

__all__ = ["few"]  # a fixture
pytestmark = pytest.mark.usefixtures("few")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that tells digits apart, and so has something to lose."""
    base = tmp_path_factory.mktemp("trained") / "base"
    whole(base, "rate=0")
    return base


def by_hand(base: Path, directory: Path, rate: float) -> tuple[float, float]:
    """Accuracy of the network as given and right after zeroing, in percent."""
    task = made(directory, "rate=0", f"pretrained='{base}'")
    model = task.full.network
    given = accuracy(*logits(model, task.images))
    fpgm.zero_(model, fpgm.select(model, "gm", rate=rate))
    return given, accuracy(*logits(model, task.images))


def test_without_epochs_a_trained_network_is_pruned_proven_and_reported(
    tmp_path: Path, trained: Path
) -> None:
    words = ("epochs=0", "rate=0.2", f"pretrained='{trained}'")
    report = whole(tmp_path / "r", *words)
    given, zeroed = by_hand(trained, tmp_path, 0.2)
    found = report["accuracy"]
    assert (found["dense"], found["first_zeroing"]) == (given, zeroed)
    assert found["zeroed_last"] == found["compact_last"] == found["best"]["zeroed"] == zeroed
    assert given != zeroed
    assert report["pruning"]["pruned_filters"] > 0
    assert report["pruning"]["churn"] == report["pruning"]["revived"] == []
    assert report["timing"] == {"train_s": 0, "prune_s": 0, "eval_s": 0, "images_per_s": 0}
    assert report["equivalence"]["agreement"] == 1
    kept = torch.load(tmp_path / "r" / "compact.pt", weights_only=True)["keep"]
    assert len(kept["conv1"]) == 13
    text = (tmp_path / "r" / "report.md").read_text()
    assert f"accuracy of the given network {given:.2f} %, zeroed {zeroed:.2f} %" in text
    assert "Nothing was trained." in text
    assert (tmp_path / "r" / "history.csv").read_text().strip() == ",".join(COLUMNS)
    run = read(tmp_path / "r")
    assert (run.problem, run.history) == (None, [])


@pytest.mark.parametrize("schedule", ["printed", "asymptotic", "soft", "hard"])
def test_without_epochs_every_schedule_prunes_at_once_at_the_full_rate(
    tmp_path: Path, trained: Path, schedule: str
) -> None:
    words = ("epochs=0", "rate=0.4", f"pretrained='{trained}'", f"schedule={schedule}")
    assert whole(tmp_path / "r", *words)["pruning"]["pruned_filters"] == 264


def test_without_epochs_and_without_a_trained_network_there_is_nothing_to_do(
    tmp_path: Path,
) -> None:
    with pytest.raises(Error, match=r"epochs=0: nothing is trained; name .* pretrained=RUN_DIR"):
        made(tmp_path, "epochs=0")


def test_accuracy_after_the_first_zeroing_is_told_and_survives_a_kill(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("rate=0.2", f"pretrained='{trained}'", "optimizer.lr=0.01")
    report = whole(tmp_path / "whole", *words)
    _, zeroed = by_hand(trained, tmp_path, 0.2)
    assert report["accuracy"]["first_zeroing"] == zeroed
    assert report["accuracy"]["zeroed_last"] != zeroed  # it was trained since
    cut_short(tmp_path / "cut", monkeypatch, *words)
    assert whole(tmp_path / "cut", *words)["accuracy"] == report["accuracy"]
    line = f"right after the first zeroing, before any training {zeroed:.2f} %"
    assert line in (tmp_path / "cut" / "report.md").read_text()


@pytest.mark.parametrize(
    "words", [("rate=0.4",), ("rate=0", "pretrained"), ("schedule=printed", "pretrained")]
)
def test_no_accuracy_is_told_of_a_zeroing_that_was_not_or_of_a_network_that_knew_nothing(
    tmp_path: Path, trained: Path, words: tuple[str, ...]
) -> None:
    named = [f"pretrained='{trained}'" if word == "pretrained" else word for word in words]
    report = whole(tmp_path / "r", "epochs=1", *named)
    assert report["accuracy"]["first_zeroing"] is None
    assert "first zeroing" not in (tmp_path / "r" / "report.md").read_text()


def test_history_of_a_run_has_the_columns_that_one_without_epochs_promises(tmp_path: Path) -> None:
    whole(tmp_path / "r", "epochs=1")
    with (tmp_path / "r" / "history.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


def test_a_run_that_another_version_began_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(tmp_path, monkeypatch)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["methods"] = [{} for _ in state["methods"]]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(
        Error, match=r"its last\.pt is not of this version of fpgm \(KeyError .*start"
    ):
        made(tmp_path)
