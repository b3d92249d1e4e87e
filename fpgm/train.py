"""The main job: train an epoch, select, zero, evaluate, record; at the end compact and verify."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fpgm import checkpoint, data, result
from fpgm.config import Config
from fpgm.delivery import deliver, expected_macs
from fpgm.evaluation import accuracy, logits
from fpgm.job import Job, TrainingError, prepare
from fpgm.machine import autocast
from fpgm.run import Run
from fpgm.runtimes import require
from fpgm.schedules import learning_rate, masked

log = logging.getLogger("fpgm")


def train(config: Config, run: Run) -> dict[str, Any]:
    """Take a run from where it stands to its report.

    Raises TrainingError, DataError, MachineError, CheckpointError, OSError; all that was written
    until then stays, and the same call goes on from there.
    """
    if config.tune:
        require(config.target)
    state, problem = checkpoint.restore_epoch(run.directory)
    job = prepare(config, run.directory, fresh=state is None)
    machine = f"{job.device.type} {'float32' if job.precision is None else 'bf16'}"
    history = resume(job, state)
    rate = job.pruning.full_rate()
    macs = expected_macs(job, rate)
    log.info(result.opening_line(config, rate, job.images.summary(), macs, machine))
    if rate > 0 and macs[0] == macs[1]:
        log.warning("warning: nothing is pruned: align=%d is too coarse here", config.align)
    log.info("writing to %s", run.directory)
    if problem:
        log.warning("warning: %s", problem)
    if history:
        log.info("resuming after epoch %d of %d", len(history), config.epochs)
        run.record(history)  # it may have been killed before it could
    for epoch in range(len(history), config.epochs):
        row = one_epoch(job, epoch)
        history.append(row)
        reached = {
            "model": job.model.state_dict(),
            "optimizer": job.optimizer.state_dict(),
            "keep": job.pruning.keep,
            "rate": rate,
            "history": history,
        }
        checkpoint.save_epoch(run.directory, reached)
        run.record(history)
        log.info(result.epoch_line(row, config.epochs))
    report = deliver(job, history, dict(run.config))
    for warning in report["warnings"]:
        log.warning("warning: %s", warning)
    run.finish(report, result.markdown(report, str(run.directory)))
    return report


def resume(job: Job, state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Put the job where its last checkpoint stands, or at the start. Returns the history."""
    if state is None:
        job.pruning.start()
        return []
    job.model.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    job.pruning.use(state["keep"])
    job.pruning.rate = state.get("rate")
    history: list[dict[str, Any]] = state["history"]
    return history


def one_epoch(job: Job, epoch: int) -> dict[str, Any]:
    """Train, select, zero, evaluate. Returns the epoch's row of the history (accuracies in %)."""
    started = time.perf_counter()
    lr = learning_rate(job.config.optimizer, epoch, job.config.epochs)
    for group in job.optimizer.param_groups:
        group["lr"] = lr
    loss = train_epoch(job, epoch)
    trained = time.perf_counter()
    # The last epoch's figures go into the report: in float32, as the proof is.
    precision = None if epoch == job.config.epochs - 1 else job.precision
    outputs = logits(job.model, job.images, precision)
    if not outputs.isfinite().all():  # the last step of an epoch shows only here
        raise _not_finite(job, epoch, "in the evaluation")
    before = accuracy(outputs, job.images.test_labels)
    evaluated = time.perf_counter()
    facts = job.pruning.after_epoch(epoch)
    zeroed = time.perf_counter()
    after = before
    if facts.pop("changed"):
        after = accuracy(logits(job.model, job.images, precision), job.images.test_labels)
    ended = time.perf_counter()
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "train_loss": loss,
        "accuracy_before": before,
        "accuracy_after": after,
        **facts,
        "seconds": ended - started,
        "train_s": trained - started,
        "prune_s": zeroed - evaluated,
        "eval_s": evaluated - trained + ended - zeroed,
    }


def train_epoch(job: Job, epoch: int) -> float:
    """One pass over the training images. Returns the mean loss; TrainingError if not finite."""
    config, model, optimizer = job.config, job.model, job.optimizer
    # Everything random in an epoch follows from the seed and its number, so that a resumed run
    # goes on with the same bits without the state of any generator.
    seed = config.seed * 100_003 + epoch
    torch.manual_seed(seed)
    crop, size = config.dataset, config.batch_size
    batches = data.train_batches(job.images, size, crop.pad, crop.flip, seed)
    steps = data.train_steps(job.images, size)
    frozen = masked(config.schedule, epoch, config.epochs)
    total = torch.zeros((), device=job.device, dtype=torch.float64)
    job.pruning.start_epoch()
    model.train()
    bar = tqdm(batches, f"epoch {epoch + 1}/{config.epochs}", steps, leave=False, disable=None)
    for step, (inputs, labels) in enumerate(bar, 1):
        with autocast(job.device, job.precision):
            loss = F.cross_entropy(model(inputs), labels)
        # On a GPU reading the loss would make the host wait at every step: there it is read once.
        if job.device.type == "cpu" and not math.isfinite(loss.item()):
            raise _not_finite(job, epoch, f"step {step} of {steps}")
        optimizer.zero_grad()
        loss.backward()
        job.pruning.after_backward(frozen)
        optimizer.step()
        total += loss.detach()
    if not math.isfinite(total.item()):
        raise _not_finite(job, epoch, "some step")
    return total.item() / steps


def _not_finite(job: Job, epoch: int, where: str) -> TrainingError:
    lr = job.config.optimizer.lr
    kept = f"epoch {epoch} is kept in {job.directory}" if epoch else "nothing was lost"
    return TrainingError(
        f"the loss is not finite at epoch {epoch + 1}, {where} (optimizer.lr={lr:g}): try "
        f"optimizer.lr={lr / 10:g} in a new directory; {kept}"
    )
