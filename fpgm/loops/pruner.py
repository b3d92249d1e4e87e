"""fpgm.Pruner: what fpgm-train does to filters while a network trains, in a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fpgm import methods
from fpgm.errors import CheckpointError, Error
from fpgm.keys import differences
from fpgm.loops.outcome import Report, outcome
from fpgm.loops.task import LoopTask, Source
from fpgm.loops.words import Named, pruning
from fpgm.methods import Method, Schedule, Trained
from fpgm.networks.weights import weight_of
from fpgm.selection.zero import zero_
from fpgm.training.asked import aimed

CALLED = ("after_backward", "after_step")  # at every step


class Pruner:
    """The methods of fpgm-train in a training loop of one's own. The loop calls, in this order:

        loss.backward()
        pruner.after_backward()  # right before a step that is taken
        optimizer.step()
        pruner.after_step()

    and after the last step of every epoch `pruner.after_epoch()`; in the end `pruner.finish()`.
    Where gradients are accumulated, the first two are called for the steps that the optimizer
    takes; gradients may be scaled, as by torch.amp.GradScaler.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        criterion: Named = "gm",
        rate: float = 0.4,
        schedule: Named = "frozen",
        pretrained: bool = False,
        image: tuple[int, int, int] | None = None,
        batches: Source | None = None,
        steps: int | None = None,
        state: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        """Chooses and zeroes what goes before the first epoch.

        model: where it is trained, on its device; the one inside DataParallel,
        DistributedDataParallel and torch.compile is pruned, in place; it is called as
        `model(images)`. criterion, schedule: a name, or a mapping of a name and options, {"name":
        "soft", "settle": 0.6}. pretrained: whether the network is a trained one. image: (C, H, W),
        for macs_target and the report. batches: (images, labels), to be read more than once (a
        loader, a list, or a function that returns one), for criteria that look at images and to
        estimate BatchNorm again. steps: of the optimizer in an epoch, for schedules that count
        them. state: what `state_dict` gave, where network and optimizer are loaded already. keys:
        residual, align, macs_target, rates, widths, ignore, scope, ..., as on the command line.
        Raises Error with a line for each mistake, GraphError for a network that cannot be traced.
        """
        words = {"rate": rate, "epochs": epochs, **keys}
        config = pruning(criterion, schedule, pretrained, words)
        self._asked = {**config.model_dump(), "pretrained": pretrained}
        network = bare(model)
        goal, groups = aimed(config, network, image)
        self._task = LoopTask(
            Trained(network, optimizer), goal, groups, epochs, not pretrained, batches,
            config.criterion.batches or 0, config.seed, image, steps,
        )  # fmt: skip
        self._done: tuple[nn.Module, Report] | None = None
        if state is not None:
            self._resume(state)
            return
        self._schedule, self._epoch = self._new(), 0
        self._schedule.start()
        self._before = self._versions()
        self._begin()

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self._epoch

    @property
    def keep(self) -> dict[str, Tensor]:
        """Convolution -> kept filters, sorted: the selection as it stands."""
        return self._schedule.keep

    def after_backward(self) -> None:
        """The gradients of a step that will be taken are there."""
        self._called["after_backward"] = True
        self._schedule.after_backward()

    def after_step(self) -> None:
        """The optimizer has moved the weights."""
        self._called["after_step"] = True
        self._schedule.after_step()

    def after_epoch(self) -> dict[str, Any]:
        """The last step of an epoch is taken: filters are chosen again and zeroed, as the schedule
        says. Returns what history.csv has of it (churn, pruned, revived, dead), and `changed`:
        whether the network's function has. Raises Error where the other two were not called, or
        after the last epoch."""
        if self._epoch >= self._task.epochs or self._done is not None:
            raise Error(
                f"after_epoch: epochs={self._task.epochs} are done; finish() is what is left"
            )
        missed = [name for name, called in self._called.items() if not called]
        if missed:
            raise Error(
                f"after_epoch: no {missed[0]}() in epoch {self._epoch + 1}; {missed[0]}() belongs "
                f"right {'before' if missed[0] == 'after_backward' else 'after'} optimizer.step()"
            )
        return self._end()

    def finish(self, images: Tensor | None = None) -> tuple[nn.Module, Report]:
        """The compact network, in eval mode, and what is to be said of it. The trained network is a
        plain one then, at full width, zeroed outside `keep`.

        images: (B, C, H, W), normalised as for training, on which the two are compared; by default
        the first of `batches`, or random ones of the shape `image`. Before the last epoch it ends
        the training: what is selected by then goes. Raises Error where the two differ.
        """
        if self._done is None:
            self._done = self._finished(images)
        return self._done

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, from which a loop goes on to the bit between two epochs, beside
        the state of its network and its optimizer."""
        return {"asked": self._asked, "epoch": self._epoch, "schedule": self._schedule.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, after network and optimizer have been loaded. Raises
        CheckpointError where the network has not, and where something else was asked for."""
        if self._before and self._before == self._versions():
            raise CheckpointError(
                "load_state_dict: comes after model.load_state_dict, which has not been called "
                "since this Pruner has pruned the model; with a model that was loaded before that, "
                "Pruner(..., state=state)"
            )
        self._resume(state)

    def _resume(self, state: Mapping[str, Any]) -> None:
        other = differences(state["asked"], self._asked)
        if other:
            raise CheckpointError(f"state: something else was asked for, {', '.join(other)}")
        self._task.train(self._task.full)
        self._schedule, self._epoch, self._done = self._new(), state["epoch"], None
        self._schedule.resume(state["schedule"])
        self._before = {}
        self._begin()
        self._called = dict.fromkeys(CALLED, True)  # it may have been saved within an epoch

    def _new(self) -> Schedule:
        """The schedule, as it is before anything has happened. Raises Error."""
        name, options = self._asked["schedule"]["name"], dict(self._asked["schedule"])
        kind = methods.named(options.pop("name"), "schedule")
        for moment in ("loss", "parameters"):
            if getattr(kind, moment) is not getattr(Method, moment):
                raise Error(
                    f"schedule={name}: has a {moment} of its own, which a loop of your own would "
                    "not know of; fpgm-train does"
                )
        schedule = kind(self._task, **options)
        assert isinstance(schedule, Schedule)
        return schedule

    def _begin(self) -> None:
        """The epoch that comes next, if any."""
        self._called = dict.fromkeys(CALLED, False)
        if self._epoch < self._task.epochs:
            self._schedule.before_epoch(self._epoch)

    def _end(self) -> dict[str, Any]:
        columns = self._schedule.after_epoch(self._epoch)
        self._epoch += 1
        self._begin()
        return columns

    def _finished(self, images: Tensor | None) -> tuple[nn.Module, Report]:
        task, network = self._task, self._task.full.network
        if self._epoch < task.epochs:
            task.warn(
                f"finish: {self._epoch} of {task.epochs} epochs are done; what is selected goes"
            )
            zero_(network, self.keep)
        self._schedule.finish()
        if images is None and task.source is not None:
            images, _ = next(task.batches(1))
        epochs = (self._epoch, task.epochs)
        return outcome(network, self.keep, task.prunable.kept_full, epochs, images, task.image)

    def _versions(self) -> dict[str, tuple[int, int]]:
        """Weights of layers that lose filters: which there are, how often each was written to."""
        weights = {
            name: weight_of(self._task.full.network, name) for name, kept in self.keep.items()
        }
        return {
            name: (id(weight), weight._version)
            for name, weight in weights.items()
            if len(self.keep[name]) < len(weight)
        }


def bare(model: nn.Module) -> nn.Module:
    """The network inside what spreads it over GPUs or compiles it."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
