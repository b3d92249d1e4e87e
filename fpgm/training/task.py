"""What the training loop works on, as it is before the first epoch or after the last one done."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpgm import methods
from fpgm.config import Config
from fpgm.data.images import Images
from fpgm.data.sets import load
from fpgm.errors import CheckpointError, Error, first_line
from fpgm.graph.groups import Prunable
from fpgm.keys import arch_word, network_options
from fpgm.machine.device import choose_device, choose_precision, keep_freed_memory
from fpgm.machine.ranks import ALONE, Ranks, check_batch, from_first, spread
from fpgm.methods import Goal, Method, Schedule, Trained
from fpgm.networks.models import check_size
from fpgm.networks.modes import partly_read
from fpgm.pruning.compacted import CompactTraining
from fpgm.pruning.latency import Latency
from fpgm.runs import checkpoint
from fpgm.selection.zero import pruned
from fpgm.shipping.runtimes import Target, require
from fpgm.training.asked import aimed
from fpgm.training.evaluate import accuracy, logits
from fpgm.training.pretrained import as_wanted, given, network_of

log = logging.getLogger("fpgm")


@dataclass(frozen=True)
class Readings:
    """Accuracies on the test images, in percent, None where not measured. Of a trained network
    before training: given, as it was handed over; zeroed, right after the first zeroing. trained:
    after the last epoch, before the last zeroing."""

    given: float | None = None
    zeroed: float | None = None
    trained: float | None = None


@dataclass
class Task:
    """What the loop works on.

    arch: the arguments of models.model that give this network; full: the network at full width and
    its optimizer; trained: what is stepped, the same or what a method has put in its place;
    methods: in the order in which they act, the schedule among them; history: a row for each epoch
    done; readings: accuracies that are in no row of it; problem: what was wrong with the
    checkpoint that it goes on from.
    """

    config: Config
    directory: Path
    images: Images
    arch: dict[str, Any]
    full: Trained
    goal: Goal
    prunable: Prunable
    precision: torch.dtype | None
    ranks: Ranks
    methods: list[Method] = field(default_factory=list, init=False)
    history: list[dict[str, Any]] = field(default_factory=list, init=False)
    readings: Readings = field(default_factory=Readings, init=False)
    problem: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.train(self.full)

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.image_shape

    @property
    def image(self) -> tuple[int, int, int]:
        return self.images.image_shape

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        return self.images.preprocessing()

    @property
    def epochs(self) -> int:
        return self.config.epochs

    @property
    def steps(self) -> int:
        return self.images.steps(self.config.batch_size, self.ranks)

    @property
    def from_scratch(self) -> bool:
        return self.config.pretrained is None

    @property
    def judged_on(self) -> str:
        """What the epochs' accuracies are measured on: validation, training images that are held
        out, or else test, the papers' way."""
        return "validation" if self.images.held_out_count else "test"

    @property
    def schedule(self) -> Schedule:
        """The method that owns the selection."""
        return next(method for method in self.methods if isinstance(method, Schedule))

    def shown(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The training images that the criterion looks at: the same ones at every selection, so
        that none changes by the draw, and on any number of processes."""
        return self.batches(self.config.criterion.batches or 0)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many batches of training images, as they are."""
        stream = self.images.epoch(self.config.batch_size, self.config.seed, augmented=False)
        return itertools.islice(stream, count)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The task's own of a batch: outputs (B, classes), labels (B,)."""
        smoothing = self.config.optimizer.label_smoothing
        return F.cross_entropy(outputs, labels, label_smoothing=smoothing)

    def test(self) -> float:
        """Accuracy of what is trained, on the test images, in float32 and percent."""
        return accuracy(*logits(self.trained.network, self.images, ranks=self.ranks))

    def say(self, line: str) -> None:
        """On the screen and in the run's log."""
        log.info(line)

    def warn(self, line: str) -> None:
        """Say it as a warning."""
        log.warning("warning: %s", line)

    def train(self, trained: Trained) -> None:
        """Step this from now on."""
        self.trained = trained
        self._forward: Callable[[Tensor], Tensor] | None = None  # as all processes train it

    def given(self) -> nn.Module:
        """A copy of the trained network that the run starts from, as it was then. Raises
        CheckpointError where its file has gone."""
        assert self.config.pretrained is not None
        return given(self.config, self.arch)

    def accelerated(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """The same function of a batch of images, compiled where the run is: for full batches, once
        for all epochs. Compiling for the last, short one takes longer than its one step an
        epoch."""
        if not self.config.compile:
            return network
        fast, full = self._compile(network), self.config.batch_size // self.ranks.world
        return lambda inputs: (fast if len(inputs) == full else network)(inputs)

    def _compile(self, forward: nn.Module) -> nn.Module:
        """On a GPU as CUDA graphs, but not where processes meet in the middle of them."""
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        if self.ranks.world > 1:
            # Split at DDP's buckets, the parts of a graph overwrite each other's buffers in torch
            # before 2.9 (pytorch/pytorch#160745).
            mode, torch._dynamo.config.optimize_ddp = None, False
        return torch.compile(forward, mode=mode, dynamic=False)  # type: ignore[return-value]

    def outputs(self, inputs: Tensor) -> Tensor:
        """What is trained says of a batch: (B, C, H, W) -> (B, classes)."""
        if self._forward is None:
            self._forward = self.accelerated(spread(self.trained.network, self.ranks))
        return self._forward(inputs)

    def state(self) -> dict[str, Any]:
        """Everything to go on from here to the bit."""
        return {
            "arch": self.arch,
            "preprocessing": self.preprocessing,
            "model": self.full.network.state_dict(),
            "optimizer": self.full.optimizer.state_dict(),
            "methods": [method.state() for method in self.methods],
            "history": self.history,
            "readings": asdict(self.readings),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.full.network.load_state_dict(state["model"])
        self.full.optimizer.load_state_dict(state["optimizer"])
        for method, before in zip(self.methods, state["methods"], strict=True):
            method.resume(before)
        self.history = list(state["history"])
        self.readings = Readings(**state.get("readings", {}))


def prepare(
    config: Config, directory: Path, ranks: Ranks = ALONE, images: Images | None = None
) -> Task:
    """The task as it is before the first epoch, or where its last checkpoint stands.

    images: in place of the data set that the configuration names. Raises Error; nothing is written.
    """
    keep_freed_memory()
    if config.tune or config.latency_target is not None:
        require(config.target)
    check_batch(config.batch_size, ranks)
    state, problem = from_first(checkpoint.restore_epoch(directory) if ranks.first else None, ranks)
    images = images or _images(config, ranks)
    arch: dict[str, Any] = {
        "name": config.network,
        "num_classes": len(images.classes),
        "in_channels": images.image_shape[0],
        **network_options(config.arch),
    }
    if state is not None:
        arch = state.get("arch", arch)  # what the network was built from may no longer be there
    full = _network(config, arch, images, fresh=state is None)
    if built := getattr(full.network, "rebuilt_by", None):
        arch = {k: arch[k] for k in ("name", "num_classes", "in_channels")} | dict(built)
    images = as_wanted(config, images, full.network, state)
    precision = _precision(config, full.network, images)
    goal, groups = aimed(config, full.network, images.image_shape)
    if config.prunes and not groups.layers:
        why = next((f"{name}: {why}" for name, why in groups.kept_full.items()), "no convolution")
        raise Error(
            f"arch={arch_word(config.arch)}: nothing of it can be pruned ({why}); rate=0 trains "
            "it as it is"
        )
    if config.latency_target is not None:
        goal = replace(goal, latency=_latency(config, directory, images.image_shape))
    task = Task(config, directory, images, arch, full, goal, groups, precision, ranks)
    task.problem = problem
    task.methods = _methods(config, task)
    extra = [parameter for method in task.methods for parameter in method.parameters()]
    plain = [parameter for parameter in extra if not isinstance(parameter, dict)]
    for group in [{"params": plain}, *(group for group in extra if isinstance(group, dict))]:
        if group["params"]:
            full.optimizer.add_param_group(group)
    if state is not None:
        _go_on(task, state)
    else:
        start(task)
    return task


def _go_on(task: Task, state: Mapping[str, Any]) -> None:
    try:
        task.resume(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{task.directory}: its last.pt is not of this version of fpgm ({type(error).__name__} "
            f"{first_line(error)}); start anew with hydra.run.dir= (of a sweep: hydra.sweep.dir=)"
        ) from error


def _latency(config: Config, directory: Path, image: tuple[int, int, int]) -> Latency:
    """What latency_target asks for. Raises CheckpointError where its table is not there."""
    assert config.latency_target is not None
    given = Path(config.latency_table).expanduser() if config.latency_table else None
    if given is not None and not given.exists():
        raise CheckpointError(
            f"latency_table={config.latency_table}: no such file; without it times are measured"
        )
    target = Target(config.target, image, config.target_batch, torch.get_num_threads())
    return Latency(config.latency_target, target, directory, given)


def start(task: Task) -> None:
    """The methods' first moment, and what it costs a trained network: measured here once, in
    float32, as no later moment of the run can say it."""
    given = task.test() if task.epochs == 0 else None
    for method in task.methods:
        method.start()
    masks = pruned(task.full.network, task.schedule.keep).values()
    gone = task.schedule.at_once and any(mask.any() for mask in masks)
    wanted = gone and not task.from_scratch
    task.readings = Readings(given, task.test() if wanted else None)


def _images(config: Config, ranks: Ranks) -> Images:
    """The run's data set, on its device."""
    device, options = choose_device(config.device), config.dataset.model_dump()
    # The others wait until the first has downloaded or decoded what is then there for all.
    images = load(device, **options) if ranks.first else None
    from_first(None, ranks)
    return images or load(device, **options)


def _network(config: Config, arch: dict[str, Any], images: Images, fresh: bool) -> Trained:
    """fresh: no epoch is done, so that pretrained weights are wanted."""
    model = network_of(config, arch, trained=fresh)
    check_size(arch_word(config.arch), model, images.image_shape, len(images.classes))
    model = model.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    o = config.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov
    )
    return Trained(model, optimizer)


def _precision(config: Config, network: nn.Module, images: Images) -> torch.dtype | None:
    """What to autocast to. In bf16 on a CPU torch leaves the gradients of a depthwise convolution's
    taps that meet nothing but padding as they are in memory (2.14), and training takes them up."""
    precision = choose_precision(config.precision, images.device)
    if precision is None or images.device.type != "cpu":
        return precision
    name = partly_read(network, images.image_shape)
    if name is not None and config.precision == "bf16":
        raise Error(
            f"precision=bf16: the kernel of {name} is wider than its maps, whose gradients torch "
            "gets wrong in bf16 on a CPU; precision=float32, or larger images"
        )
    return precision if name is None else None


def _methods(config: Config, task: Task) -> list[Method]:
    """What is done to the filters, in order: what trains another network in place of the full one
    first, as it brings that up to date before the schedule looks at it."""
    schedule = methods.named(config.schedule.name, "schedule")(task, **config.schedule.options)
    beside = [
        methods.named(chosen.name, "method")(task, **chosen.options)
        for chosen in config.method.values()
    ]
    assert isinstance(schedule, Schedule)
    return [CompactTraining(task, schedule, beside), schedule, *beside]
