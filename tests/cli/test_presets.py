"""Presets: whole, spelled out, and never silently half overruled."""

from __future__ import annotations

import pytest
import yaml
from commands import compose

from fpgm.cli import presets
from fpgm.keys import CONFIGS
from fpgm.training.asked import asked

PRESETS = sorted(path.stem for path in (CONFIGS / "preset").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_words_would_be(name: str) -> None:
    beside = ("pretrained=x", "macs_target=0.5")
    spelled = presets.words(name).split()
    assert len(spelled) >= 5
    assert asked(compose(f"preset={name}", *beside)) == asked(compose(*spelled, *beside))


def test_the_published_method_is_the_papers() -> None:
    c = asked(compose("preset=paper", "pretrained=x"))
    assert (c.criterion.name, c.schedule.name, c.residual, c.align) == (
        "gm",
        "frozen",
        "independent",
        1,
    )
    assert (c.optimizer.lr, c.optimizer.schedule, c.method) == (0.01, "step", {})


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["residual=inner", "epochs=3", "optimizer.lr=0.02"], []),
        (["align=8", "criterion=cpmc", "schedule.duration=0"], []),
        (
            ["criterion=gm", "schedule.duration=0.3"],
            [
                "criterion=gm: preset=best says criterion=cpmc; leave one of them out",
                "schedule.duration=0.3: preset=best says schedule.duration=0; leave one of ",
            ],
        ),
        (
            ["schedule=soft", "align=1"],
            [
                "schedule=soft: preset=best says schedule=",
                "align=1: preset=best says align=8; leave one of them out",
            ],
        ),
    ],
)
def test_a_word_that_says_something_else_is_named_with_the_preset(
    words: list[str], lines: list[str]
) -> None:
    found = list(presets.contradictions("best", words))
    assert len(found) == len(lines)
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start)


def test_a_preset_without_a_teacher_lets_one_in_and_one_with_does_not_lose_it() -> None:
    assert list(presets.contradictions("best", ["method=distillation"])) == []
    assert list(presets.contradictions("speed", ["method=[]"])) == [
        "method=[]: preset=speed says method=[distillation]; leave one of them out"
    ]


def test_all_that_a_preset_sets_is_found() -> None:
    for name in PRESETS:
        content = yaml.safe_load((CONFIGS / "preset" / f"{name}.yaml").read_text())
        assert len(presets.said(name)) == len(content) - 1 + len(content["defaults"])
    assert presets.said("best")["schedule.duration"] == 0  # of a group, and not the whole group
