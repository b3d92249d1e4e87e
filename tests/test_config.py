"""Words become one checked value; what is wrong is said in a line that helps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from commands import compose
from hypothesis import given
from hypothesis import strategies as st

from fpgm.cli.command import quoted
from fpgm.criteria import CRITERIA
from fpgm.errors import Error
from fpgm.keys import CONFIGS, differences, flatten, suggestion
from fpgm.methods import METHODS, Goal
from fpgm.networks.models import MODELS
from fpgm.runs.grid import run_name
from fpgm.selection.rule import Rule
from fpgm.training.asked import asked

DEFAULTS = compose()
# Schedules that prune a trained network.
TRAINED = [n for n, m in METHODS.items() if m.problems(Goal(Rule(), 0.4), from_scratch=True)]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "word",
    [f"{g}={o}" for g in ("arch", "criterion", "schedule", "method", "optimizer", "dataset")
     for o in options(g)],
)  # fmt: skip
def test_every_file_in_configs_makes_a_valid_run(word: str) -> None:
    root = ["dataset.root=x"]
    timm, own = ["arch.name=resnet18"], ["arch.build=own_networks:tiny"]
    extra = {"arch=timm": timm, "arch=own": own, "arch=compact": ["pretrained=x"],
             "dataset=image_folder": root, "dataset=imagenet": root,
             "method=reconstruction": ["pretrained=x"], "method=inq": ["pretrained=x"],
             "method=ttq": ["rate=0"], "method=shared_kernels": ["rate=0", "pretrained=x"],
             **{f"schedule={name}": ["pretrained=x"] for name in TRAINED}}  # fmt: skip
    config = asked(compose(word, *extra.get(word, [])))
    group, option = word.split("=")
    value = getattr(config, group)
    value = value[option] if group == "method" else value
    if group != "optimizer" and option != "printed":
        name = value["source"] if isinstance(value, dict) else getattr(value, "name", value)
        assert name == option


def test_every_network_and_criterion_is_offered_on_the_command_line() -> None:
    assert options("arch") == sorted([*MODELS, "compact", "own", "timm"])
    assert options("criterion") == sorted(CRITERIA)


def test_defaults_are_the_papers_recipe() -> None:
    c = asked(DEFAULTS)
    assert (c.epochs, c.batch_size, c.rate, c.arch) == (200, 128, 0.4, "resnet20")
    assert (c.criterion.name, c.schedule.name) == ("gm", "frozen")
    o = c.optimizer
    assert (o.lr, o.momentum, o.nesterov, o.weight_decay, o.gamma) == (0.1, 0.9, True, 5e-4, 0.2)
    assert [round(m * c.epochs) for m in o.milestones] == [60, 120, 160]
    assert asked(compose("arch=resnet110")).optimizer.warmup_epochs == 1
    vgg = asked(compose("arch=vgg16"))
    assert (vgg.epochs, vgg.batch_size, vgg.optimizer.nesterov) == (160, 64, False)
    tuned = asked(compose("optimizer=finetune_paper")).optimizer
    assert (tuned.lr, tuned.schedule, tuned.milestones) == (0.01, "step", o.milestones)
    slim = asked(compose("arch=densenet40"))
    assert (slim.epochs, slim.batch_size, slim.optimizer.nesterov) == (160, 64, True)
    assert (slim.optimizer.weight_decay, slim.optimizer.milestones) == (1e-4, [0.5, 0.75])
    assert asked(compose("arch=lenet5", "dataset=mnist")).optimizer.lr == 0.01


@pytest.mark.parametrize("words", [("criterion.p=inf",), ()])
def test_infinity_is_a_word_of_the_command_line(words: tuple[str, ...]) -> None:
    config = asked(compose("criterion=lp", *words))
    assert config.criterion.options == {"p": float("inf")}
    again = yaml.safe_load(yaml.safe_dump(config.as_dict()))
    assert differences(again, config.as_dict()) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rate", 1.5, "rate=1.5: must be at least 0 and below 1, for example rate=0.4"),
        ("rate", -0.1, "rate=-0.1: must be at least 0 and below 1"),
        ("rate", "abc", "rate=abc: must be a number, for example rate=0.4"),
        ("rate", float("nan"), "rate=nan: must be at least 0"),
        ("rate", True, "rate=True: must be a number"),
        ("epochs", -1, "epochs=-1: must be at least 0, for example epochs=200"),
        ("epochs", 0, "epochs=0: nothing is trained; name a trained network with pretrained="),
        ("epochs", 1.5, "epochs=1.5: must be a whole number"),
        ("device", "tpu", "device=tpu: choose one of auto, cpu, cuda"),
        (
            "schedule.settle",
            2,
            "schedule.settle=2: must be auto, or at least 0 and at most 1, for example",
        ),
        (
            "schedule.settle",
            "soon",
            "schedule.settle=soon: must be auto, or at least 0 and at most",
        ),
        ("optimizer.label_smoothing", 1.0, "optimizer.label_smoothing=1.0: must be at least 0 and"),
        ("optimizer.schedule", "linear", "optimizer.schedule=linear: choose one of step, cosine"),
        ("criterion.distance", "l3", "criterion.distance=l3: choose one of l2, l1, cosine"),
        ("optimizer.milestones", 3, "optimizer.milestones=3: must be a list of numbers"),
        ("optimizer.milestones", [60, 120], "shares of the epochs"),
        ("optimizer.momentum", 0, "optimizer.nesterov=true: needs momentum"),
        ("dataset.root", 7, "dataset.root=7: must be a word"),
        (
            "dataset.validation",
            0.95,
            "dataset.validation=0.95: must be at least 0 and at most 0.9, for example "
            "dataset.validation=0.1",
        ),
        ("dataset", "digits", "dataset=digits: must be a group of keys"),
        ("ratte", 0.4, "ratte: no such key, did you mean rate?"),
    ],
)
def test_bad_value_names_key_value_and_what_would_do(key: str, value: object, message: str) -> None:
    values = copy.deepcopy(DEFAULTS)
    *path, last = key.split(".")
    node = values
    for part in path:
        node = node[part]
    node[last] = value
    with pytest.raises(Error) as caught:
        asked(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    wrong = {"criterion": {"name": "gm", "distance": "l7"}, "rate": 2, "epochs": -1, "seed": "x"}
    wrong["schedule"] = {**DEFAULTS["schedule"], "settle": 3}
    with pytest.raises(Error) as caught:
        asked({**DEFAULTS, **wrong})
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "rate",
        "epochs",
        "seed",
        "criterion.distance",
        "schedule.settle",
    ]


def test_hard_pruning_asks_for_a_trained_network() -> None:
    with pytest.raises(Error, match="pretrained=RUN_DIR"):
        asked(compose("schedule=hard"))


def test_config_survives_being_written_and_read() -> None:
    config = asked(DEFAULTS)
    assert asked(config.as_dict()) == config


@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.none(), max_size=3))
def test_differences_are_empty_only_for_equal_configurations(values: dict) -> None:
    other = {**values, "z": {"deep": 1}}
    assert differences(values, values) == []
    assert differences(values, other) == ["z.deep: None -> 1"]
    assert flatten(other)["z.deep"] == 1


def test_mistyped_keys_get_the_nearest_one() -> None:
    known = flatten(DEFAULTS)
    assert suggestion("optimizer.lrr", known) == "did you mean optimizer.lr?"
    assert suggestion("lr", known) == "did you mean optimizer.lr?"
    assert suggestion("batchsize", known) == "did you mean batch_size?"


def test_run_directory_is_named_by_the_words_whatever_their_order() -> None:
    assert run_name(["rate=0.4", "criterion=gm"]) == "criterion=gm,rate=0.4"
    assert run_name(["dataset.root=/a/b/photos", "+x=1"]) == "dataset.root=photos,x=1"
    assert run_name(["pretrained=outputs/base/zeroed.pt"]) == "pretrained=base_zeroed.pt"
    assert run_name([]) == "default"
    assert "/" not in run_name(["pretrained=../../outputs/a b/"])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("pretrained=outputs/rate=0,seed=1", "pretrained='outputs/rate=0,seed=1'"),
        ("dataset.root=~/photos", "dataset.root='~/photos'"),
        ("hydra.run.dir=/", "hydra.run.dir='/'"),
        ("pretrained='a=b'", "pretrained='a=b'"),
        ("pretrained=a,b", "pretrained=a,b"),
        ("pretrained=/,/tmp", "pretrained='/','/tmp'"),
        ("pretrained=", "pretrained="),
        ("pretrained=${x}", "pretrained=${x}"),
        ("seed=" + ",".join(map(str, range(100))), "seed=" + ",".join(map(str, range(100)))),
        ("rate=0.3,0.4", "rate=0.3,0.4"),
        ("--help", "--help"),
    ],
)
def test_run_directory_can_be_given_as_it_is_printed(word: str, expected: str) -> None:
    assert quoted(word) == expected


@given(st.lists(st.text(st.characters(codec="ascii"), max_size=90), max_size=5))
def test_run_directory_name_is_always_one_plain_folder(words: list[str]) -> None:
    name = run_name(words)
    assert name not in ("", ".", "..")
    assert len(name) <= 200
    assert "/" not in name
    assert "\0" not in name
    assert Path("outputs", name).name == name
