"""The main job: train an epoch, let the methods act, evaluate, record."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fpgm.compaction.constants import analyse
from fpgm.data.images import summary
from fpgm.errors import Error, first_line
from fpgm.graph.cost import cost
from fpgm.graph.trace import trace
from fpgm.machine.device import autocast, precision_name
from fpgm.machine.ranks import mean, share_buffers
from fpgm.runs import checkpoint
from fpgm.runs.run import Run
from fpgm.training import result
from fpgm.training.evaluate import accuracy, logits
from fpgm.training.recipe import learning_rate
from fpgm.training.task import Task

log = logging.getLogger("fpgm")

# Of history.csv, in its order.
COLUMNS = (
    "epoch", "lr", "train_loss", "accuracy_before", "accuracy_after", "churn", "pruned", "revived",
    "dead", "seconds", "train_s", "input_s", "prune_s", "eval_s",
)  # fmt: skip


def train(task: Task, run: Run) -> None:
    """Take a task from where it stands through its last epoch.

    Raises Error and OSError; all that was written until then stays, and the same command goes on
    from there.
    """
    _announce(task, run)
    if task.epochs == 0 and task.ranks.first:
        run.record([], task.schedule.scores, COLUMNS)
    for epoch in range(len(task.history), task.epochs):
        task.history.append(one_epoch(task, epoch))
        if task.ranks.first:
            checkpoint.save_epoch(run.directory, task.state())
            run.record(task.history, task.schedule.scores)
            log.info(result.epoch_line(task.history[-1], task.epochs, task.judged_on))


def _announce(task: Task, run: Run) -> None:
    """Say what is about to happen."""
    if task.ranks.first:
        run.get_ready()
    machine = precision_name(task.device, task.precision)
    processes = f", {task.ranks.world} processes" if task.ranks.world > 1 else ""
    rate = task.schedule.full_rate()
    network, image = task.full.network, task.image_shape
    dense, graph = cost(network, image), trace(network, image)
    small = analyse(graph, task.schedule.expected()).macs(dense)
    where = f"{task.device.type} {machine}{processes}"
    images = summary(task.images)
    log.info(result.opening_line(task.config, rate, images, (dense.macs, small), where))
    if rate > 0 and dense.macs == small:
        task.warn(f"nothing is pruned: align={task.config.align} is too coarse here")
    log.info("writing to %s", run.directory)
    if task.problem:
        task.warn(task.problem)
    if task.history and task.ranks.first:
        log.info("resuming after epoch %d of %d", len(task.history), task.epochs)
        run.record(task.history, task.schedule.scores)  # it may have been killed before it could


def one_epoch(task: Task, epoch: int) -> dict[str, Any]:
    """Train, evaluate, let the methods act. Returns the epoch's row of the history (accuracies in
    percent)."""
    started = time.perf_counter()
    passed = train_epoch(task, epoch)
    trained = time.perf_counter()
    # The last epoch's figures go into the report: in float32, as the proof is.
    last = epoch == task.epochs - 1
    precision = None if last else task.precision
    validates = task.judged_on == "validation"
    judged = partial(logits, images=task.images, ranks=task.ranks, held_out=validates)
    outputs, labels = judged(task.trained.network, dtype=precision)
    if not outputs.isfinite().all():  # the last step of an epoch shows only here
        raise _not_finite(task, epoch, "in the evaluation")
    before = after = accuracy(outputs, labels)
    if last:
        # Where other images judge the epochs, the test images are asked now and at the very end.
        task.readings = replace(task.readings, trained=task.test() if validates else before)
    evaluated = time.perf_counter()
    # Filters are chosen again and zeroed here.
    columns: dict[str, Any] = {}
    for method in task.methods:
        columns |= method.after_epoch(epoch)
    acted = time.perf_counter()
    # Where no weight has changed, neither has the accuracy.
    if columns.pop("changed", False):
        after = accuracy(*judged(task.schedule.zeroed, dtype=precision))
    ended = time.perf_counter()
    return {
        "epoch": epoch + 1,
        "lr": passed["lr"],
        "train_loss": passed["loss"],
        "accuracy_before": before,
        "accuracy_after": after,
        **columns,
        "seconds": ended - started,
        "train_s": trained - started,
        "input_s": passed["input_s"],
        "prune_s": acted - evaluated,
        "eval_s": evaluated - trained + ended - acted,
    }


def train_epoch(task: Task, epoch: int) -> dict[str, float]:
    """One pass over the training images.

    Returns the mean loss, the learning rate of the first step and the seconds that were spent
    waiting for images. Raises Error where the loss is not finite, the memory does not suffice or a
    process is lost.
    """
    # Everything random in an epoch follows from the seed and its number, so that a resumed run
    # goes on with the same bits without the state of any generator.
    seed = task.config.seed * 100_003 + epoch
    torch.manual_seed(seed)
    steps = task.images.steps(task.config.batch_size, task.ranks)
    batches = iter(task.images.epoch(task.config.batch_size, seed, task.ranks))
    # Methods first: one of them may exchange what is trained.
    for method in task.methods:
        method.before_epoch(epoch)
    rates = [
        learning_rate(task.config.optimizer, epoch, task.epochs, at, steps)
        for at in range(max(steps, 1))
    ]
    groups = (*task.full.optimizer.param_groups, *task.trained.optimizer.param_groups)
    task.trained.network.train()
    total, done, waited = torch.zeros((), device=task.device, dtype=torch.float64), 0, 0.0
    hidden = None if task.ranks.first else True  # None: on a terminal only
    with tqdm(
        total=steps, desc=f"epoch {epoch + 1}/{task.epochs}", leave=False, disable=hidden
    ) as bar:
        while True:
            # Waiting for images is timed by itself: it should be next to nothing.
            began = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - began
            if batch is None:
                break
            for group in groups:
                group["lr"] = rates[done]
            done += 1
            where = f"step {done} of {steps}"
            with _in_words(task, epoch, where):
                loss = step(task, *batch)
            # On a GPU reading the loss would make the host wait at every step: there once, below.
            if task.device.type == "cpu" and not math.isfinite(loss.item()):
                raise _not_finite(task, epoch, where)
            total += loss
            bar.update()
    loss_mean = mean(total, task.ranks).item() / max(done, 1)
    if not math.isfinite(loss_mean):
        raise _not_finite(task, epoch, "some step")
    share_buffers(task.trained.network, task.ranks)
    return {"loss": loss_mean, "lr": rates[0], "input_s": waited}


def step(task: Task, inputs: Tensor, labels: Tensor) -> Tensor:
    """One step of the optimizer on images (B, C, H, W) and labels (B,). Returns the loss."""
    # Forward: in bf16 where the run says so, the loss always in float32.
    with autocast(task.device, task.precision):
        outputs = task.outputs(inputs)
        loss = task.loss(outputs, labels)
        for method in task.methods:
            loss = loss + method.loss(inputs, outputs, labels)
    # Backward: methods may change the gradients, as masks do.
    task.trained.optimizer.zero_grad()
    loss.backward()
    for method in task.methods:
        method.after_backward()
    # Step: methods may correct the weights, as projections do.
    task.trained.optimizer.step()
    for method in task.methods:
        method.after_step()
    return loss.detach()


@contextlib.contextmanager
def _in_words(task: Task, epoch: int, where: str) -> Iterator[None]:
    """What goes wrong in a step, for the person at the keyboard."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size, world = task.config.batch_size, task.ranks.world
        half = size // 2 // world * world  # all processes get the same share
        cure = f"try batch_size={half} in a new directory" if half else "it needs a GPU with more"
        raise Error(f"batch_size={size}: does not fit into the GPU's memory; {cure}") from error
    except RuntimeError as error:
        # gloo says only that; with nccl there is a class for it, and much else can go wrong.
        lost = RuntimeError if task.device.type == "cpu" else torch.distributed.DistError
        if task.ranks.world == 1 or not isinstance(error, lost):
            raise
        raise Error(
            f"epoch {epoch + 1}, {where}: another process is lost "
            f"({first_line(error)}); the same command goes on after epoch {epoch}"
        ) from error


def _not_finite(task: Task, epoch: int, where: str) -> Error:
    lr = task.config.optimizer.lr
    kept = f"epoch {epoch} is kept in {task.directory}" if epoch else "nothing was lost"
    return Error(
        f"the loss is not finite at epoch {epoch + 1}, {where} (optimizer.lr={lr:g}): try "
        f"optimizer.lr={lr / 10:g} in a new directory; {kept}"
    )
