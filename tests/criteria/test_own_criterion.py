"""A criterion of one's own is one file and one YAML: options, evidence, command line."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from commands import compose
from tasks import few, whole

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.errors import Error
from fpgm.keys import CONFIGS, flatten
from fpgm.training.asked import asked

__all__ = ["few"]  # a fixture

FILE = '''
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fpgm.criteria import Maps, criterion


def energy_of(maps: Tensor) -> Tensor:
    return maps.square().mean((2, 3))


@criterion(energy=Maps(energy_of))
def loud(
    weight: Tensor, *, energy: Tensor, power: Annotated[float, Field(ge=0.5)] = 1.0
) -> Tensor:
    """Mean square of the feature map, to a power."""
    return energy.pow(power)
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the criterion's one file and one YAML beside the configs."""
    (tmp_path / "my_criteria.py").write_text(FILE)
    (tmp_path / "mine" / "criterion").mkdir(parents=True)
    text = "name: my_criteria:loud\npower: 0.5\nbatches: 1\n"
    (tmp_path / "mine" / "criterion" / "loud.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_criterion_with_an_option_and_evidence_of_its_own_runs(place: Path, few: None) -> None:
    search = f"hydra.searchpath=[file://{place}/mine]"
    report = whole(place / "run", "criterion=loud", "criterion.power=2", search)
    assert report["status"] == "done"
    assert report["config"]["criterion"] == {
        "name": "my_criteria:loud",
        "power": 2,
        "batches": 1,
    }
    assert report["pruning"]["pruned_filters"] == 264
    with pytest.raises(Error, match=r"^criterion.power=0: must be at least 0.5"):
        asked(compose("criterion=loud", "criterion.power=0", search))
    with pytest.raises(Error, match=r"^criterion.batches=null: criterion=my_criteria:loud looks"):
        asked(compose("criterion=loud", "criterion.batches=null", search))


def test_it_is_scored_by_what_it_says_it_looks_at(place: Path) -> None:
    model, name = fpgm.model("resnet20").eval(), "my_criteria:loud"
    batches = [(torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.long))]
    evidence = fpgm.evidence.gather(model, [name], batches)
    with torch.no_grad():  # a BatchNorm that has seen no data takes the batch's statistics
        stem = torch.relu(model.bn1.train()(model.conv1(batches[0][0])))
    torch.testing.assert_close(
        evidence["conv1"]["energy"], stem.square().mean((0, 2, 3)).double(), rtol=1e-5, atol=1e-6
    )
    keep = fpgm.select(model, name, 0.5, evidence=evidence)
    assert keep["conv1"].tolist() == sorted(evidence["conv1"]["energy"].argsort()[8:].tolist())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nowhere:loud", r"criterion=nowhere:loud: cannot be imported \(No module named 'nowhere'"),
        ("my_criteria:quiet", "criterion=my_criteria:quiet: cannot be imported"),
        ("my_criteria:energy_of", "criterion=my_criteria:energy_of: is no criterion; mark it with"),
    ],
)
def test_what_cannot_be_found_is_named(place: Path, name: str, line: str) -> None:
    with pytest.raises(Error, match=line):
        fpgm.select(fpgm.model("resnet20"), name)


def test_every_yaml_holds_the_options_of_its_own_criterion_and_no_other() -> None:
    for name, criterion in CRITERIA.items():
        values = flatten(compose(f"criterion={name}")["criterion"])
        expected = {"name", *criterion.options, *(["batches"] if criterion.reads_images else [])}
        assert set(values) == expected, name
        options = {key: values[key] for key in criterion.options}
        assert options == criterion.options, f"{name}: other defaults than its signature's"
        first = (CONFIGS / "criterion" / f"{name}.yaml").read_text().splitlines()[0]
        assert first.startswith("# "), textwrap.shorten(first, 40)
