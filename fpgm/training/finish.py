"""From the trained network to what is shipped: compact, prove it equal, save both, report."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fpgm.compaction.compact import compact, compare, equivalence
from fpgm.errors import Error, ShippingError
from fpgm.graph.cost import cost, paper_reduction
from fpgm.graph.trace import trace
from fpgm.machine.device import environment
from fpgm.runs import checkpoint
from fpgm.selection.ranking import at_floor
from fpgm.shipping import tuning
from fpgm.training import result
from fpgm.training.evaluate import accuracy, logits, recalibrate
from fpgm.training.task import Job

MANY_CLASSES = 100  # with which a top-5 accuracy says something
FLOAT32, FLOAT64 = 1e-5, 1e-12  # how far equal networks may lie apart, of the largest output


def deliver(job: Job, history: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """Compact, verify on all test images, save both networks. Returns the report."""
    model, images, keep = job.model, job.images, job.pruning.keep
    if job.config.schedule.recalibrate:
        c = job.config
        recalibrate(model, images, c.schedule.recalibrate, c.batch_size, c.seed)
    tuned, problems = tune_for(job) if job.config.tune else (None, [])
    ballast = tuned.ballast if tuned else {}
    small = compact(model, keep, ballast)
    (full, labels), (reduced, _) = logits(model, images), logits(small, images)
    shared = {"arch": job.arch, "keep": keep, "preprocessing": images.preprocessing()}
    sizes = []
    for name, network in (("zeroed.pt", model), ("compact.pt", small)):
        weights = {key: value.cpu() for key, value in network.state_dict().items()}
        own = {"ballast": ballast} if network is small and ballast else {}
        checkpoint.write(job.directory / name, {**shared, **own, "state_dict": weights})
        sizes.append((job.directory / name).stat().st_size)
    measured = compare(full, reduced)
    problems += proven(job, small, measured)
    dense, compacted = cost(model, images.image_shape), cost(small, images.image_shape)
    c = job.config
    as_paper = (c.residual, c.align, c.macs_target, c.scope) == ("independent", 1, None, "layer")
    kept = {name: len(filters) for name, filters in keep.items()}
    groups = job.pruning.prunable.groups
    macs = {layer.name: layer.macs for layer in dense.layers}
    return result.report(
        config=config,
        environment=environment(job.device, job.precision),
        history=history,
        costs=(dense, compacted),
        sizes=(sizes[0], sizes[1]),
        paper_macs=paper_reduction(trace(model), macs, job.config.rate) if as_paper else None,
        accuracies=(accuracy(full, labels), accuracy(reduced, labels)),
        top5=accuracy(reduced, labels, top=5) if len(images.classes) >= MANY_CLASSES else None,
        equivalence=measured,
        kept=kept,
        collapsed=at_floor(groups, kept, c.align, c.floor) if c.scope == "global" else [],
        tuning=tuned.summary() if tuned else None,
        kept_full=job.pruning.prunable.kept_full,
        problems=problems,
        train_images=images.counts[0],
    )


def proven(job: Job, small: nn.Module, measured: dict[str, float]) -> list[str]:
    """What is to be said of a difference that compare() has `measured` in float32, if anything.

    A network that cancels large numbers makes rounding larger than the limit; float64, on some of
    the images, tells rounding from a mistake. Raises Error where the networks differ.
    """
    if measured["max_abs_diff"] <= FLOAT32 * measured["max_abs_logit"]:
        return []
    said = (
        f"the compact network differs from the zeroed one by {measured['max_abs_diff']:.3g}"
        f" in float32, more than {FLOAT32:g} of the largest output {measured['max_abs_logit']:.3g}"
    )
    images, _ = next(iter(job.images.tests(64)))
    doubles = [copy.deepcopy(network).double() for network in (job.model, small)]
    exact = equivalence(doubles[0], doubles[1], images.double())
    if exact["max_abs_diff"] <= FLOAT64 * exact["max_abs_logit"]:
        return [f"{said}: rounding, by {exact['max_abs_diff']:.1g} in float64"]
    raise Error(
        f"{said}, and by {exact['max_abs_diff']:.3g} in float64: no report; both networks are"
        f" kept in {job.directory}"
    )


def tune_for(job: Job) -> tuple[tuning.Tuned | None, list[str]]:
    """The fastest form of the job's compact network on its target, a CPU, or what prevented it.

    A trained network is not lost because it could not be timed: it is shipped as cut.
    """
    c = job.config
    runtime = tuning.Target(
        c.target, job.images.image_shape, c.target_batch, torch.get_num_threads()
    )
    model = copy.deepcopy(job.model).cpu()
    try:
        return tuning.tune_apart(model, job.pruning.keep, runtime, job.pruning.prunable.groups), []
    except ShippingError as error:
        return None, [f"not tuned, and maybe slower than the dense network: {error}"]


def expected_macs(job: Job, rate: float) -> tuple[int, int]:
    """MACs of the network at full width and compacted as the weights stand now."""
    shape = job.images.image_shape
    keep = job.pruning.selection(rate, job.config.align)
    return cost(job.model, shape).macs, cost(compact(job.model, keep), shape).macs
