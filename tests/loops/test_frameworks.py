"""Lightning's trainer and Accelerate prune as a plain loop does, and go on from a checkpoint."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from test_pruner import EPOCHS, OPTIMIZERS, STEPS, an_epoch, network, pairs, same, words, zeroed
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fpgm
from fpgm.errors import Error

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Lit(L.LightningModule):
    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net, self.optimizer = network(), optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Epochs(L.LightningDataModule):
    """The batches that a plain loop of test_pruner has: others in every epoch."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(pairs(self.trainer.current_epoch), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(pairs(99), batch_size=None)


def options(schedule: str) -> dict[str, Any]:
    return {key: value for key, value in words(schedule).items() if key not in ("epochs", "steps")}


def trainer(*callbacks: L.Callback, **more: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        **{"max_epochs": EPOCHS, "accelerator": "cpu", "enable_checkpointing": False,
           "reload_dataloaders_every_n_epochs": 1, "callbacks": list(callbacks), **quiet, **more}
    )  # fmt: skip


def plain(schedule: str, optimizer: str = "sgd") -> tuple[nn.Module, Any]:
    model = network()
    steps = OPTIMIZERS[optimizer](model.parameters())
    pruner = fpgm.Pruner(model, steps, **words(schedule))
    while pruner.epoch < EPOCHS:
        an_epoch(model, steps, pruner)
        pruner.after_epoch()
    return model, pruner.finish()[1]


@pytest.mark.parametrize(
    ("schedule", "optimizer"), [("frozen", "adamw"), ("gated", "sgd"), ("fade", "sgd")]
)
def test_a_trainer_gets_the_bits_of_a_plain_loop(schedule: str, optimizer: str) -> None:
    module, prune = Lit(optimizer), fpgm.PruneFilters(**options(schedule))
    trainer(prune, num_sanity_val_steps=1).fit(module, Epochs())
    model, report = plain(schedule, optimizer)
    assert same(module.net, model)
    assert all(torch.equal(kept, report.keep[name]) for name, kept in prune.report.keep.items())
    assert zeroed(module.net, prune.report.keep) == 0
    assert prune.report.reduction == report.reduction
    assert prune.compact(torch.zeros(1, 3, 12, 12)).shape == (1, 10)


class Killed(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("killed")


@pytest.mark.parametrize("monitor", [None, "loss"], ids=["last", "best"])
@pytest.mark.parametrize("schedule", ["soft", "gated"])
def test_a_trainer_that_was_killed_goes_on_with_the_same_bits(
    schedule: str, monitor: str | None, tmp_path: Path
) -> None:
    def keeps() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{epoch}", monitor=monitor, save_top_k=1)

    cut = trainer(
        fpgm.PruneFilters(**options(schedule)), keeps(), Killed(), enable_checkpointing=True
    )
    with pytest.raises(RuntimeError, match="killed"):
        cut.fit(Lit(), Epochs())
    module, prune = Lit(), fpgm.PruneFilters(**options(schedule))
    trainer(prune).fit(module, Epochs(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    model, report = plain(schedule)
    assert same(module.net, model)
    assert prune.report.kept == report.kept


def test_a_checkpoint_between_the_last_step_and_the_end_of_an_epoch_loses_no_selection(
    tmp_path: Path,
) -> None:
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=STEPS, save_top_k=-1)
    cut = trainer(fpgm.PruneFilters(**options("soft")), every, Killed(), enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="killed"):
        cut.fit(Lit(), Epochs())
    module, prune = Lit(), fpgm.PruneFilters(**options("soft"))
    trainer(prune).fit(module, Epochs(), ckpt_path=str(tmp_path / f"step={STEPS}.ckpt"))
    assert prune.report.epochs == (EPOCHS, EPOCHS)
    assert same(module.net, plain("soft")[0])


def test_gradients_may_be_accumulated() -> None:
    seen: list[int] = []

    class Watched(fpgm.PruneFilters):
        def on_train_batch_end(self, *_: Any) -> None:
            assert self.pruner is not None
            seen.append(zeroed(module.net, self.pruner.keep))

    module, prune = Lit("adamw"), Watched(**options("frozen"))
    trainer(prune, accumulate_grad_batches=2).fit(module, Epochs())
    assert seen == [0] * STEPS * EPOCHS
    assert prune.report.epochs == (EPOCHS, EPOCHS)


def test_a_callback_that_comes_later_counts_the_epochs_that_are_left(tmp_path: Path) -> None:
    dense = trainer(
        ModelCheckpoint(tmp_path, filename="d"), enable_checkpointing=True, max_epochs=1
    )
    dense.fit(Lit(), Epochs())
    prune = fpgm.PruneFilters(**{**options("hard"), "pretrained": True})
    trainer(prune).fit(Lit(), Epochs(), ckpt_path=str(tmp_path / "d.ckpt"))
    assert prune.report.epochs == (EPOCHS - 1, EPOCHS - 1)


class Pair(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.other = network()


@pytest.mark.parametrize(
    ("module", "given", "more", "line"),
    [
        (Lit, {"network": "body"}, {}, "network=body: Lit has net"),
        (Pair, {}, {}, "network=None: the convolutions are in net, other; PruneFilters"),
        (Lit, {"rate": 2.0}, {}, "rate=2.0: must be at least 0 and below 1"),
        (Lit, {}, {"max_epochs": -1, "max_steps": 2}, "epochs=None: the trainer has no max_epochs"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    module: type[Lit], given: dict[str, Any], more: dict[str, Any], line: str
) -> None:
    with pytest.raises(Error, match="^" + line):
        trainer(fpgm.PruneFilters(**given), **more).fit(module(), Epochs())


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fpgm.loops.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(Error, match=r"needs Lightning, pip install 'fpgm\[lightning\]'"):
        fpgm.PruneFilters  # noqa: B018


@pytest.fixture
def alone() -> Iterator[None]:
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("schedule", ["frozen", "gated"])
@pytest.mark.parametrize("every", [1, 2], ids=["each", "accumulated"])
def test_accelerate_gets_the_bits_of_a_plain_loop(schedule: str, every: int, alone: None) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=every)
    model = network()
    model, optimizer = accelerator.prepare(model, OPTIMIZERS["adamw"](model.parameters()))
    pruner = fpgm.Pruner(model, optimizer, **words(schedule))
    while pruner.epoch < EPOCHS:
        for images, labels in pairs(pruner.epoch):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                if accelerator.sync_gradients:
                    pruner.after_backward()
                optimizer.step()
                if accelerator.sync_gradients:
                    pruner.after_step()
                optimizer.zero_grad()
        pruner.after_epoch()
    _, report = pruner.finish()
    assert zeroed(accelerator.unwrap_model(model), report.keep) == 0
    if every == 1:
        assert same(accelerator.unwrap_model(model), plain(schedule, "adamw")[0])


def test_accelerates_mixed_precision_is_not_undone_in_silence(alone: None) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = network()
    model, optimizer = accelerator.prepare(model, OPTIMIZERS["sgd"](model.parameters()))
    fpgm.Pruner(model, optimizer, **words("soft"))
    with pytest.raises(Error, match=r"replaces the network's forward.*schedule=fade, or soft"):
        fpgm.Pruner(model, optimizer, **words("gated"))
