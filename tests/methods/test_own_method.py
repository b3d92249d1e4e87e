"""A method of one's own is one file and one YAML: options, moments, state, command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import compose
from tasks import cut_short, few, made, whole

from fpgm.errors import Error
from fpgm.methods import METHODS, Schedule
from fpgm.methods import named as method_named
from fpgm.training.asked import asked

__all__ = ["few"]  # a fixture

FILE = '''
from typing import Annotated, Literal

import torch
from pydantic import Field

from fpgm.methods import Method


class Tempered(Method):
    """Scales the outputs in its own loss by a temperature that it learns; counts its steps."""

    name = "tempered"

    def __init__(self, task, *, weight: Annotated[float, Field(ge=0)] = 0.1,
                 kind: Literal["l1", "l2"] = "l2"):
        super().__init__(task)
        self.weight, self.kind = weight, kind
        self.temperature = torch.nn.Parameter(torch.ones(()))
        self.steps = 0

    def parameters(self):
        return [self.temperature]

    def loss(self, inputs, outputs, labels):
        assert len(inputs) == len(outputs) == len(labels)
        size = outputs.square() if self.kind == "l2" else outputs.abs()
        return self.weight * (self.temperature * size).mean()

    def after_step(self):
        self.steps += 1

    def after_epoch(self, epoch):
        return {"temperature": self.temperature.item(), "steps": self.steps}

    def state(self):
        return {"temperature": self.temperature.detach(), "steps": self.steps}

    def resume(self, state):
        self.temperature.data.copy_(state["temperature"])
        self.steps = state["steps"]
'''


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_methods.py").write_text(FILE)
    (tmp_path / "mine" / "method").mkdir(parents=True)
    text = "# @package method.tempered\nname: my_methods:Tempered\nweight: 0.2\nkind: l2\n"
    (tmp_path / "mine" / "method" / "tempered.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"hydra.searchpath=[file://{tmp_path}/mine]"


def bits(directory: Path) -> dict[str, torch.Tensor]:
    state = torch.load(directory / "last.pt", weights_only=True)
    return {
        **state["model"],
        **{f"own.{k}": torch.as_tensor(v) for k, v in state["methods"][-1].items()},
    }


def test_a_method_with_a_parameter_a_loss_and_state_runs_and_resumes_to_the_bit(
    tmp_path: Path, search: str, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("method=tempered", "method.tempered.weight=0.5", "criterion=l2", search)
    report = whole(tmp_path / "whole", *words)
    assert report["config"]["method"] == {
        "tempered": {"name": "my_methods:Tempered", "weight": 0.5, "kind": "l2"}
    }
    rows = (tmp_path / "whole" / "history.csv").read_text().splitlines()
    columns = rows[0].split(",")
    steps = [int(row.split(",")[columns.index("steps")]) for row in rows[1:]]
    temperatures = [float(row.split(",")[columns.index("temperature")]) for row in rows[1:]]
    assert steps == [2, 4]
    assert 1 > temperatures[0] > temperatures[1]  # it is trained
    cut_short(tmp_path / "cut", monkeypatch, *words)
    again = whole(tmp_path / "cut", *words)
    assert {k: v for k, v in again.items() if k != "timing"} == {
        k: v for k, v in report.items() if k != "timing"
    }
    ours, theirs = bits(tmp_path / "cut"), bits(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_without_it_the_network_is_another(tmp_path: Path, search: str, few: None) -> None:
    plain, other = (
        made(tmp_path, "rate=0.7", "residual=inner", *words)
        for words in ((), ("method=tempered", search))
    )
    assert len(plain.full.optimizer.param_groups) == 1
    assert len(other.full.optimizer.param_groups) == 2
    # What is not known to leave pruned filters alone is trained at full width.
    for task in (plain, other):
        for method in task.methods:
            method.start()
            method.before_epoch(0)
    assert plain.trained is not plain.full
    assert other.trained is other.full


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["method=tempered", "method.tempered.kind=l3"], "method.tempered.kind=l3: choose one of"),
        (["method=tempered", "method.tempered.weight=-1"], "method.tempered.weight=-1: must be at"),
        (
            ["schedule.name=melting"],
            "schedule=melting: choose one of admm, asymptotic, fade, frozen, ga",
        ),
        (
            ["schedule.name=slimming"],
            "schedule=slimming: goes with method=; here choose one of admm, as",
        ),
        (
            ["+method.x={name: soft}"],
            "method=soft: goes with schedule=; here choose one of admm_weights, distil",
        ),
        (["+method.x={name: 'no:Such'}"], r"method=no:Such: cannot be imported \(No module named"),
        (["+method.x={name: 'my_methods:FILE'}"], "method=my_methods:FILE: cannot be imported"),
        (["+method.x={name: 'torch:Tensor'}"], "method=torch:Tensor: is no method; derive it fr"),
        (["schedule=hard"], "schedule=hard: prunes a trained network, name it with pretrained="),
        (
            ["schedule.settle=2"],
            "schedule.settle=2: must be auto, or at least 0 and at most 1, for",
        ),
        (["schedule.interval=0"], "schedule.interval=0: must be at least 1"),
        (["+schedule.foo=1"], "schedule.foo: no such key"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(search: str, words: list[str], line: str) -> None:
    with pytest.raises(Error, match="^" + line) as caught:
        asked(compose(*words, search))
    assert "\n" not in str(caught.value)


def test_every_yaml_holds_the_options_of_its_own_method_and_no_other() -> None:
    for name in METHODS:
        schedule = issubclass(METHODS[name], Schedule)
        group = "schedule" if schedule else "method"
        assert method_named(name, group) is METHODS[name]
        values = compose(f"{group}={name}")[group]
        values = dict(values if schedule else values[name])
        assert values.pop("name") == name
        problems = METHODS[name].check(values, "")
        assert problems == [], name
        for option in values:  # there are no others
            lacking = {k: v for k, v in values.items() if k != option}
            assert METHODS[name].check({**lacking, f"{option}s": 1}, "") != []
