"""The main job: train an epoch, select, zero, evaluate, record; at the end compact and verify."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fpgm.config import Config
from fpgm.data.images import summary
from fpgm.errors import Error, first_line
from fpgm.machine.device import autocast, precision_name
from fpgm.machine.ranks import ALONE, Ranks, check_batch, from_first, mean, share_buffers
from fpgm.methods.schedules import learning_rate, masked
from fpgm.runs import checkpoint
from fpgm.runs.run import Run
from fpgm.shipping.runtimes import require
from fpgm.training import result
from fpgm.training.evaluate import accuracy, logits
from fpgm.training.finish import deliver, expected_macs
from fpgm.training.task import Job, load_images, prepare

log = logging.getLogger("fpgm")


def train(config: Config, run: Run, ranks: Ranks = ALONE) -> dict[str, Any] | None:
    """Take a run from where it stands to its report; None on ranks that write nothing.

    Raises Error, OSError; all that was
    written until then stays, and the same call goes on from there.
    """
    if config.tune:
        require(config.target)
    check_batch(config.batch_size, ranks)
    found = checkpoint.restore_epoch(run.directory) if ranks.first else None
    state, problem = from_first(found, ranks)
    images = load_images(config, ranks)
    job = prepare(config, run.directory, images, fresh=state is None, ranks=ranks)
    history = resume(job, state)
    rate = job.pruning.full_rate()
    if ranks.first:
        run.get_ready()
    _announce(job, run, rate, problem, history)
    for epoch in range(len(history), config.epochs):
        row = one_epoch(job, epoch)
        history.append(row)
        if ranks.first:
            reached = {
                "model": job.model.state_dict(),
                "optimizer": job.optimizer.state_dict(),
                "keep": job.pruning.keep,
                "rate": rate,
                "scores": job.pruning.finite_scores(),
                "history": history,
            }
            checkpoint.save_epoch(run.directory, reached)
            run.record(history, job.pruning.finite_scores())
            log.info(result.epoch_line(row, config.epochs))
    if not ranks.first:
        return None
    report = deliver(job, history, dict(run.config))
    for warning in report["warnings"]:
        log.warning("warning: %s", warning)
    run.finish(report, result.markdown(report, str(run.directory)))
    return report


def _announce(
    job: Job, run: Run, rate: float, problem: str | None, history: list[dict[str, Any]]
) -> None:
    config, machine = job.config, precision_name(job.device, job.precision)
    processes = f", {job.ranks.world} processes" if job.ranks.world > 1 else ""
    macs = expected_macs(job, rate)
    where = f"{job.device.type} {machine}{processes}"
    log.info(result.opening_line(config, rate, summary(job.images), macs, where))
    if rate > 0 and macs[0] == macs[1]:
        log.warning("warning: nothing is pruned: align=%d is too coarse here", config.align)
    log.info("writing to %s", run.directory)
    if problem:
        log.warning("warning: %s", problem)
    if history and job.ranks.first:
        log.info("resuming after epoch %d of %d", len(history), config.epochs)
        run.record(history, job.pruning.finite_scores())  # it may have been killed before it could


def resume(job: Job, state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Put the job where its last checkpoint stands, or at the start. Returns the history."""
    history: list[dict[str, Any]] = []
    if state is None:
        job.pruning.start()
    else:
        job.model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
        job.pruning.use(state["keep"])
        job.pruning.rate = state.get("rate")
        job.pruning.scores = state.get("scores", {})
        history = state["history"]
    job.set_up()
    return history


def one_epoch(job: Job, epoch: int) -> dict[str, Any]:
    """Train, select, zero, evaluate. Returns the epoch's row of the history (accuracies in %)."""
    started = time.perf_counter()
    lr = learning_rate(job.config.optimizer, epoch, job.config.epochs)
    passed = train_epoch(job, epoch, lr)
    trained = time.perf_counter()
    # The last epoch's figures go into the report: in float32, as the proof is.
    precision = None if epoch == job.config.epochs - 1 else job.precision
    outputs, labels = logits(job.network, job.images, precision, job.ranks)
    if not outputs.isfinite().all():  # the last step of an epoch shows only here
        raise _not_finite(job, epoch, "in the evaluation")
    before = after = accuracy(outputs, labels)
    evaluated = time.perf_counter()
    facts = job.select_again(epoch)
    zeroed = time.perf_counter()
    if facts.pop("changed"):
        after = accuracy(*logits(job.model, job.images, precision, job.ranks))
    ended = time.perf_counter()
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "train_loss": passed["loss"],
        "accuracy_before": before,
        "accuracy_after": after,
        **facts,
        "seconds": ended - started,
        "train_s": trained - started,
        "input_s": passed["input_s"],
        "prune_s": zeroed - evaluated,
        "eval_s": evaluated - trained + ended - zeroed,
    }


def train_epoch(job: Job, epoch: int, lr: float) -> dict[str, float]:
    """One pass over the training images.

    Returns the mean loss and the seconds that were spent waiting for images. Raises Error
    where the loss is not finite or the memory does not suffice, Error where a process is lost.
    """
    config = job.config
    # Everything random in an epoch follows from the seed and its number, so that a resumed run
    # goes on with the same bits without the state of any generator.
    seed = config.seed * 100_003 + epoch
    torch.manual_seed(seed)
    steps = job.images.steps(config.batch_size, job.ranks)
    batches = iter(job.images.epoch(config.batch_size, seed, job.ranks))
    name = f"epoch {epoch + 1}/{config.epochs}"
    hidden = None if job.ranks.first else True  # None: on a terminal only
    job.start_epoch(lr)
    total, done, waited = torch.zeros((), device=job.device, dtype=torch.float64), 0, 0.0
    with tqdm(total=steps, desc=name, leave=False, disable=hidden) as bar:
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            done += 1
            total += _step(job, batch, epoch, f"step {done} of {steps}")
            bar.update()
    loss = mean(total, job.ranks).item() / max(done, 1)
    if not math.isfinite(loss):
        raise _not_finite(job, epoch, "some step")
    share_buffers(job.network, job.ranks)
    job.end_epoch(done)
    return {"loss": loss, "input_s": waited}


def _step(
    job: Job, batch: tuple[torch.Tensor, torch.Tensor], epoch: int, where: str
) -> torch.Tensor:
    """One step of the optimizer. Returns the loss."""
    inputs, labels = batch
    frozen = masked(job.config.schedule, epoch, job.config.epochs)
    try:
        with _memory(job), autocast(job.device, job.precision):
            loss = F.cross_entropy(job.outputs(inputs), labels)
        # On a GPU reading the loss would make the host wait at every step: there it is read once.
        if job.device.type == "cpu" and not math.isfinite(loss.item()):
            raise _not_finite(job, epoch, where)
        job.stepper.zero_grad()
        with _memory(job):
            loss.backward()
    except RuntimeError as error:
        # gloo says only that; with nccl there is a class for it, and much else can go wrong.
        lost = RuntimeError if job.device.type == "cpu" else torch.distributed.DistError
        if job.ranks.world == 1 or isinstance(error, Error) or not isinstance(error, lost):
            raise
        raise Error(
            f"epoch {epoch + 1}, {where}: another process is lost "
            f"({first_line(error)}); the same command goes on after epoch {epoch}"
        ) from error
    job.pruning.after_backward(frozen)
    with _memory(job):  # the first step makes the momentum
        job.stepper.step()
    return loss.detach()


@contextlib.contextmanager
def _memory(job: Job) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_large(job) from error


def _not_finite(job: Job, epoch: int, where: str) -> Error:
    lr = job.config.optimizer.lr
    kept = f"epoch {epoch} is kept in {job.directory}" if epoch else "nothing was lost"
    return Error(
        f"the loss is not finite at epoch {epoch + 1}, {where} (optimizer.lr={lr:g}): try "
        f"optimizer.lr={lr / 10:g} in a new directory; {kept}"
    )


def _too_large(job: Job) -> Error:
    size, world = job.config.batch_size, job.ranks.world
    half = size // 2 // world * world  # all processes get the same share
    cure = f"try batch_size={half} in a new directory" if half else "it needs a GPU with more"
    return Error(f"batch_size={size}: does not fit into the GPU's memory; {cure}")
