"""A training loop of one's own gets what fpgm-train gives: the same filters, the same bits."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from commands import compose
from tasks import few, made, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock
from zoo import randomised

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.errors import CheckpointError, Error
from fpgm.keys import CONFIGS
from fpgm.loops.words import entry
from fpgm.methods import METHODS, Goal, Method, Schedule
from fpgm.selection.rule import Rule
from fpgm.training.recipe import learning_rate

__all__ = ["few"]  # a fixture

# Those that need nothing of a loop but the calls.
SCHEDULES = sorted(
    name
    for name, method in METHODS.items()
    if issubclass(method, Schedule)
    and (method.loss, method.parameters) == (Method.loss, Method.parameters)
)
TRAINED = [name for name in SCHEDULES if METHODS[name].problems(Goal(Rule(), 0.4), True)]
IMAGE, STEPS, EPOCHS = (3, 12, 12), 2, 3

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=5e-4, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
}


def network() -> nn.Module:
    """A residual block and what leads to it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    block = BasicBlock(8, 8)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return randomised(nn.Sequential(*layers, block, *head), 0).train()


def pairs(epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(8, *IMAGE, generator=g), torch.randint(10, (8,), generator=g))
        for _ in range(STEPS)
    ]


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, pair: tuple[Tensor, Tensor]
) -> Iterator[None]:
    """One step of a loop, with a pause where a Pruner is called."""
    optimizer.zero_grad()
    F.cross_entropy(model(pair[0]), pair[1]).backward()
    yield
    optimizer.step()
    yield


def an_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: fpgm.Pruner) -> None:
    torch.manual_seed(pruner.epoch)  # for methods that draw
    for pair in pairs(pruner.epoch):
        moments = step(model, optimizer, pair)
        next(moments)
        pruner.after_backward()
        next(moments)
        pruner.after_step()


def words(schedule: str, **more: Any) -> dict[str, Any]:
    return {
        "epochs": EPOCHS, "schedule": schedule, "pretrained": schedule in TRAINED, "steps": STEPS,
        "image": IMAGE, **more,
    }  # fmt: skip


def zeroed(model: nn.Module, keep: dict[str, Tensor]) -> int:
    """How many filters outside `keep` are not all zero."""
    left = 0
    for name, kept in keep.items():
        weight = model.get_submodule(name).weight
        left += int(weight.flatten(1).any(1).sum()) - int(weight[kept].flatten(1).any(1).sum())
    return left


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plain_loop_gets_the_bits_of_fpgm_train(schedule: str, tmp_path: Path, few: None) -> None:
    torch.manual_seed(0)
    start = fpgm.model("resnet20", in_channels=1)
    torch.save(start.state_dict(), tmp_path / "w.pt")
    run = [f"schedule={schedule}", f"pretrained={tmp_path / 'w.pt'}"]
    if not METHODS[schedule].check({"train_compact": False}, ""):
        run.append("schedule.train_compact=false")
    task = made(tmp_path / "r", *run)
    config, images = task.config, task.images
    model = start.to(memory_format=torch.channels_last)
    o = config.optimizer
    sgd = torch.optim.SGD(
        model.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov
    )
    pruner = fpgm.Pruner(
        model, sgd, epochs=2, rate=config.rate, schedule=schedule, pretrained=True,
        steps=task.steps, image=task.image_shape,
    )  # fmt: skip
    for epoch in range(2):
        torch.manual_seed(epoch)  # as fpgm-train, for methods that draw
        model.train()
        for at, pair in enumerate(images.epoch(config.batch_size, epoch)):
            sgd.param_groups[0]["lr"] = learning_rate(o, epoch, 2, at, task.steps)
            moments = step(model, sgd, pair)
            next(moments)
            pruner.after_backward()
            next(moments)
            pruner.after_step()
        pruner.after_epoch()
    compact, report = pruner.finish()
    theirs = whole(tmp_path / "r", *run)
    saved = torch.load(tmp_path / "r" / "zeroed.pt", weights_only=True)
    assert report.keep.keys() == saved["keep"].keys()
    assert all(torch.equal(kept, saved["keep"][name]) for name, kept in report.keep.items())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in saved["state_dict"].items())
    assert report.compact is not None
    assert report.compact.macs == theirs["compact"]["macs"] < theirs["dense"]["macs"]
    assert report.reduction["macs"] == theirs["reduction"]["macs"]
    assert report.equivalence is not None
    assert report.equivalence["max_abs_diff"] <= 1e-5 * report.equivalence["max_abs_logit"]
    assert not compact.training


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["frozen", "soft", "gated", "fade", "iterative"])
def test_what_is_pruned_stays_zero_whatever_the_optimizer_remembers(
    schedule: str, name: str
) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for pair in pairs():  # which leaves momentum and moments behind
        list(step(model, optimizer, pair))
    options = {"settle": 0.5} if schedule in ("soft", "gated") else {}
    options = {"duration": 0.5} if schedule == "fade" else options
    options = {"every": 2} if schedule == "iterative" else options
    pruner = fpgm.Pruner(
        model, optimizer, **{**words(schedule), "schedule": {"name": schedule, **options}}
    )
    held = 0
    for epoch in range(EPOCHS):
        for pair in pairs(epoch):
            moments = step(model, optimizer, pair)
            next(moments)
            pruner.after_backward()
            next(moments)
            pruner.after_step()
            always = schedule in ("frozen", "iterative")
            fixed = always or epoch == EPOCHS - 1  # settled, or faded
            assert not fixed or zeroed(model, pruner.keep) == 0
            held += fixed
        pruner.after_epoch()
    assert held >= STEPS
    assert zeroed(model, pruner.finish()[1].keep) == 0


@pytest.mark.parametrize("done", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loop_that_was_killed_goes_on_with_the_same_bits(schedule: str, done: int) -> None:
    more = {} if schedule == "gated" else {"criterion": "taylor", "batches": shuffled()}

    def begun() -> tuple[nn.Module, torch.optim.Optimizer, fpgm.Pruner]:
        model = network()
        adam = OPTIMIZERS["adamw"](model.parameters())
        return model, adam, fpgm.Pruner(model, adam, **words(schedule, **more))

    uncut, adam, pruner = begun()
    file = io.BytesIO()
    while pruner.epoch < EPOCHS:
        an_epoch(uncut, adam, pruner)
        pruner.after_epoch()
        if pruner.epoch == done:
            parts = {"model": uncut, "optimizer": adam, "pruner": pruner}
            torch.save({key: part.state_dict() for key, part in parts.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, adam, again = begun()
    model.load_state_dict(saved["model"])
    adam.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["pruner"])
    while again.epoch < EPOCHS:
        an_epoch(model, adam, again)
        again.after_epoch()
    ours, theirs = pruner.finish()[1], again.finish()[1]
    assert all(torch.equal(kept, theirs.keep[name]) for name, kept in ours.keep.items())
    assert same(uncut, model)
    assert sum(ours.kept.values()) < sum(ours.filters.values())


def shuffled() -> DataLoader:
    images = torch.cat([x for x, _ in pairs()])
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), 4, shuffle=True)


def test_images_are_the_same_at_every_look_and_the_loops_own_chance_is_left_alone() -> None:
    model, loader = network(), shuffled()

    def augmented() -> Iterator[tuple[Tensor, Tensor]]:
        return ((images + torch.randn(()), labels) for images, labels in loader)

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sgd = OPTIMIZERS["sgd"](model.parameters())
    pruner = fpgm.Pruner(
        model, sgd, **words("soft", criterion={"name": "taylor", "batches": 2}, batches=augmented)
    )
    first = list(pruner._task.shown())
    assert torch.equal(torch.rand(3), expected)
    second = list(pruner._task.shown())
    assert len(first) == 2
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True)
               for a, b in zip(one, two, strict=True))  # fmt: skip


def test_a_state_is_refused_where_it_would_be_lost_or_is_of_something_else() -> None:
    model = network()
    sgd = OPTIMIZERS["sgd"](model.parameters())
    pruner = fpgm.Pruner(model, sgd, **words("soft"))
    an_epoch(model, sgd, pruner)
    pruner.after_epoch()
    saved, weights = pruner.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    # Loaded first, the weights would now be those of another selection.
    early = fpgm.Pruner(model, sgd, **words("soft"))
    with pytest.raises(CheckpointError, match=r"comes after model\.load_state_dict"):
        early.load_state_dict(saved)
    model.load_state_dict(weights)
    early.load_state_dict(saved)
    assert early.epoch == 1
    model.load_state_dict(weights)
    direct = fpgm.Pruner(model, sgd, **words("soft"), state=saved)
    assert direct.epoch == 1
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"^state: .*rate: 0\.4 -> 0\.5"):
        fpgm.Pruner(model, sgd, **words("soft", rate=0.5), state=saved)


def test_whoever_stops_early_gets_what_was_selected(caplog: pytest.LogCaptureFixture) -> None:
    for schedule in ("soft", "gated", "fade"):
        model = network()
        sgd = OPTIMIZERS["sgd"](model.parameters())
        pruner = fpgm.Pruner(model, sgd, **words(schedule))
        an_epoch(model, sgd, pruner)  # pruned filters have moved
        chosen = pruner.keep
        compact, report = pruner.finish()
        assert "finish: 0 of 3 epochs are done" in caplog.text
        assert report.epochs == (0, EPOCHS)
        assert all(torch.equal(kept, chosen[name]) for name, kept in report.keep.items())
        assert sum(report.kept.values()) < sum(report.filters.values())
        assert zeroed(model, report.keep) == 0
        assert "forward" not in vars(model)  # a plain network
        x = torch.randn(2, *IMAGE)
        torch.testing.assert_close(compact(x), model.eval()(x), rtol=1e-3, atol=1e-2)
        assert pruner.finish()[0] is compact
        with pytest.raises(Error, match="finish"):
            pruner.after_epoch()


def test_a_trained_network_is_pruned_without_training() -> None:
    model = network()
    sgd = OPTIMIZERS["sgd"](model.parameters())
    pruner = fpgm.Pruner(model, sgd, epochs=0, pretrained=True, batches=pairs())
    _, report = pruner.finish()
    assert report.equivalence is not None
    assert report.equivalence["images"] == 8  # the first of its batches
    assert "15 of 24 filters are kept\nMACs: " in str(report)


@pytest.mark.parametrize("group", ["criterion", "schedule"])
def test_a_name_means_what_it_means_on_the_command_line(group: str) -> None:
    for file in (CONFIGS / group).glob("*.yaml"):
        assert entry(group, file.stem) == compose(f"{group}={file.stem}")[group]
    assert entry("schedule", {"name": "soft", "settle": 0.6})["settle"] == 0.6
    assert set(CRITERIA) <= {file.stem for file in (CONFIGS / "criterion").glob("*.yaml")}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"macs_targt": 0.5}, r"macs_targt: no such key, did you mean macs_target\?"),
        ({"rate": 1.5}, "rate=1.5: must be at least 0 and below 1"),
        ({"rate": "0.5"}, "rate=0.5: must be a number"),
        ({"criterion": "gn"}, "criterion=gn: choose one of "),
        ({"criterion": {"p": 2}}, "criterion=.*: a name, or a mapping with one"),
        ({"criterion": {"name": "gm", "distance": "l3"}}, "criterion.distance=l3: choose one of"),
        ({"schedule": {"name": "soft", "setle": 1}}, r"schedule.setle: no such key, did you mean"),
        ({"schedule": "melting"}, "schedule=melting: choose one of admm, asymptotic, fade, frozen"),
        ({"schedule": "slimming"}, "schedule=slimming: goes with method="),
        ({"schedule": "hard"}, r"schedule=hard: prunes a trained network.*pretrained=True"),
        ({"schedule": "fade", "pretrained": True}, r"steps=None: .* steps=len\(loader\)"),
        ({"epochs": 0}, "epochs=0: nothing is trained.* pretrained=True"),
        ({"epochs": -1}, "epochs=-1: must be at least 0"),
        ({"macs_target": 0.5}, r"image=None: .* image=\(C, H, W\)"),
        ({"criterion": "taylor"}, r"batches=None: .* batches=loader"),
        ({"criterion": "taylor", "batches": iter(())}, "batches: is an iterator"),
        ({"criterion": "taylor", "batches": []}, "batches: has no images"),
        ({"criterion": "taylor", "batches": [{"x": 1}]}, "batches: has a dict"),
        ({"ignore": ("no*",)}, r"ignore: no\* fits no layer"),
        ({"rates": {"0": 2.0}}, "rates: 0=2.0: must be at least 0 and below 1"),
        ({"scope": "global", "rates": {"0": 0.1}}, "rates: goes with scope=layer"),
        ({"method": {"slimming": {}}}, "method=.*: changes the loss"),
        ({"latency_target": 0.5}, "latency_target=0.5: is looked for by fpgm-train"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(given: dict[str, Any], line: str) -> None:
    model = network()
    with pytest.raises(Error, match="^" + line) as caught:
        fpgm.Pruner(model, OPTIMIZERS["sgd"](model.parameters()), **{"epochs": 2, **given})
    assert "\n" not in str(caught.value)


def test_a_loop_that_forgets_a_moment_or_goes_on_too_long_is_told() -> None:
    model = network()
    sgd = OPTIMIZERS["sgd"](model.parameters())
    pruner = fpgm.Pruner(model, sgd, epochs=1)
    with pytest.raises(Error, match=r"no after_backward\(\) in epoch 1; .* right before optimizer"):
        pruner.after_epoch()
    list(step(model, sgd, pairs()[0]))
    pruner.after_backward()
    with pytest.raises(Error, match=r"no after_step\(\) in epoch 1; .* right after optimizer"):
        pruner.after_epoch()
    pruner.after_step()
    assert pruner.after_epoch()["pruned"] > 0
    with pytest.raises(Error, match="after_epoch: epochs=1 are done"):
        pruner.after_epoch()


def test_a_filter_behind_a_closed_gate_opens_without_a_push_from_before() -> None:
    model = network()
    adam = OPTIMIZERS["adamw"](model.parameters())
    pruner = fpgm.Pruner(model, adam, **words("gated"))
    an_epoch(model, adam, pruner)
    gone = torch.ones(8, dtype=torch.bool).index_fill(0, pruner.keep["0"], False)
    assert gone.any()
    for moment in ("exp_avg", "exp_avg_sq"):  # of the BatchNorm behind, which was held
        assert not adam.state[model[1].weight][moment][gone].any()
        assert adam.state[model[1].weight][moment][~gone].all()


class Lossy(Schedule):
    """Adds to the loss."""

    def loss(self, inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.square().mean()


def test_a_schedule_that_changes_the_loss_is_refused() -> None:
    model = network()
    with pytest.raises(Error, match="has a loss of its own"):
        fpgm.Pruner(
            model, OPTIMIZERS["sgd"](model.parameters()), epochs=1, schedule="test_pruner:Lossy"
        )


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("schedule", ["frozen", "gated"])
def test_a_network_that_is_spread_or_compiled_is_pruned_inside(
    schedule: str, one_process: None
) -> None:
    def compiled(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        return torch.compile(model, backend="eager")  # type: ignore[return-value]

    outcomes = []
    for wrap in (lambda m: m, nn.parallel.DistributedDataParallel, compiled):
        model = network()
        wrapped = wrap(model)
        sgd = OPTIMIZERS["sgd"](model.parameters())
        pruner = fpgm.Pruner(wrapped, sgd, **words(schedule))
        while pruner.epoch < EPOCHS:
            an_epoch(wrapped, sgd, pruner)
            pruner.after_epoch()
        assert zeroed(model, pruner.finish()[1].keep) == 0
        outcomes.append(model)
    assert same(outcomes[0], outcomes[1])
    for name, value in outcomes[0].state_dict().items():  # dynamo's order of sums may be another
        torch.testing.assert_close(value, outcomes[2].state_dict()[name], rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_not_trained_does_not_stop_the_others() -> None:
    model = network()
    model[0].requires_grad_(False)
    adam = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    pruner = fpgm.Pruner(model, adam, epochs=1, image=IMAGE)
    an_epoch(model, adam, pruner)
    pruner.after_epoch()
    adam.state_dict()  # has nothing of what the optimizer does not step
    assert zeroed(model, pruner.finish()[1].keep) == 0


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(
    "schedule", [{"name": "greg", "every": 1}, {"name": "scp", "strength": 0.05}]
)
def test_what_was_to_go_is_gone_also_of_a_loop_that_ends_early(
    schedule: dict[str, Any], epochs: int
) -> None:
    torch.manual_seed(0)
    model = fpgm.model("resnet20")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    batches = [(torch.randn(8, *IMAGE), torch.randint(10, (8,))) for _ in range(3)]
    pruner = fpgm.Pruner(
        model, optimizer, epochs=2, rate=0.3, schedule=schedule, criterion="l1", pretrained=True,
        image=IMAGE, steps=3, batches=batches, residual="inner",
    )  # fmt: skip
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images), labels).backward()
            pruner.after_backward()
            optimizer.step()
            pruner.after_step()
        pruner.after_epoch()
    small, report = pruner.finish()
    assert report.compact.macs < 0.8 * report.dense.macs
    images, _ = batches[0]
    torch.testing.assert_close(small(images), model.eval()(images), atol=1e-4, rtol=1e-4)
