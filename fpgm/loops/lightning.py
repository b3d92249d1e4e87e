"""fpgm.Pruner as a callback of Lightning's Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fpgm.errors import Error
from fpgm.loops.outcome import Report
from fpgm.loops.pruner import Pruner

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise Error("fpgm.PruneFilters: needs Lightning, pip install 'fpgm[lightning]'") from error


class PruneFilters(pl.Callback):
    """Prunes the filters of a LightningModule's network while a Trainer trains it.

    compact, report: what Pruner.finish returns, once training has ended; pruner: while it goes on.
    Checkpoints hold what it takes to go on, to the bit where they are written between two epochs.
    """

    compact: nn.Module
    report: Report

    def __init__(
        self,
        network: str | None = None,
        *,
        epochs: int | None = None,
        **words: Any,
    ) -> None:
        """network: the name of the network in the LightningModule, "" for the module itself, by
        default the one that has convolutions; epochs: by default the trainer's max_epochs; words:
        the other arguments of Pruner: criterion, rate, schedule, image, .... What is wrong with
        them is said when training begins.
        """
        self.pruner: Pruner | None = None
        self._network, self._epochs, self._words = network, epochs, words
        self._state: Mapping[str, Any] | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Network and optimizer are loaded by now."""
        network = _network(pl_module, self._network)
        self._optimizer = optimizer = _optimizer(trainer, network)
        state = self._state or {"first": trainer.current_epoch, "pruner": None}
        self._first, self._state = state["first"], None
        epochs = self._epochs
        if epochs is None:
            if trainer.max_epochs is None or trainer.max_epochs < 0:
                raise Error("epochs=None: the trainer has no max_epochs; PruneFilters(epochs=N)")
            epochs = trainer.max_epochs - self._first
        words = {"steps": _steps(trainer), **self._words}
        self.pruner = pruner = Pruner(
            network, optimizer, epochs=epochs, state=state["pruner"], **words
        )
        # From a checkpoint between an epoch's last step and its end, Lightning goes on with the
        # next epoch.
        while self._first + pruner.epoch < trainer.current_epoch:
            pruner.after_epoch()
        self._hook = optimizer.register_step_post_hook(lambda *_: pruner.after_step())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (
            self.pruner is not None
            and getattr(optimizer, "optimizer", optimizer) is self._optimizer
        ):
            self.pruner.after_backward()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.pruner is not None:
            self.pruner.after_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.pruner is not None:
            self._hook.remove()
            self.compact, self.report = self.pruner.finish()

    def state_dict(self) -> dict[str, Any]:
        if self.pruner is None:
            return {}
        return {"first": self._first, "pruner": self.pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None  # there was no epoch yet


def _network(module: pl.LightningModule, name: str | None) -> nn.Module:
    """The network in a LightningModule. Raises Error that names what there is."""
    children = dict(module.named_children())
    pruned = [n for n, child in children.items() if any(map(_convolves, child.modules()))]
    if name is None:
        if len(pruned) != 1:
            found = f"are in {', '.join(pruned)}" if pruned else "are nowhere"
            raise Error(
                f"network=None: the convolutions {found}; PruneFilters(NAME) prunes one module of "
                f"{type(module).__name__}, PruneFilters('') what its forward computes"
            )
        return children[pruned[0]]
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        known = ", ".join(children)
        raise Error(f"network={name}: {type(module).__name__} has {known}") from error


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _optimizer(trainer: pl.Trainer, network: nn.Module) -> torch.optim.Optimizer:
    """That of the trainer's optimizers which steps the network. Raises Error."""
    ours = {id(parameter) for parameter in network.parameters()}
    for optimizer in trainer.optimizers:
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    raise Error("configure_optimizers: none of the optimizers has the network's parameters")


def _steps(trainer: pl.Trainer) -> int | None:
    """Of the optimizer in an epoch, None where the loader does not say."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)
