"""From the trained network to what is shipped: compact, prove it equal, save both, report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.compaction.compact import built, compare, equivalence
from fpgm.compaction.constants import Keep, analyse
from fpgm.errors import Error, ShippingError
from fpgm.graph.cost import Cost, cost, paper_reduction
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.machine.device import environment
from fpgm.runs import checkpoint, packing
from fpgm.runs.run import Run
from fpgm.selection.ranking import at_floor
from fpgm.shipping import tuning
from fpgm.shipping.runtimes import Target
from fpgm.shipping.widths import TOLERANCE, both_apart
from fpgm.training import result
from fpgm.training.evaluate import accuracy, logits
from fpgm.training.task import Task

MANY_CLASSES = 100  # with which a top-5 accuracy says something
FLOAT32, FLOAT64 = 1e-5, 1e-12  # how far equal networks may lie apart, of the largest output


def finish(task: Task, run: Run) -> dict[str, Any]:
    """Compact, verify on all test images, save both networks, report. Returns the report.

    Raises Error where the networks differ, and OSError; both networks stay.
    """
    # What the methods still have to do: from here on there is a plain network and `keep`.
    for method in task.methods:
        method.finish()
    model, images, keep = task.full.network, task.images, task.schedule.keep
    # The form that is shipped: as cut, or with ballast where that is faster.
    tuned, problems = tune_for(task) if task.config.tune else (None, [])
    ballast = tuned.ballast if tuned else {}
    graph = trace(model, images.image_shape)
    small, more = shipped(graph, keep, ballast)
    # Both networks are asked and saved before anything is judged.
    (full, labels), (reduced, _) = logits(model, images), logits(small, images)
    sizes = save(task, "zeroed.pt", model, {}), save(task, "compact.pt", small, more)
    # The proof: one function, measured on every test image.
    measured = compare(full, reduced)
    shown, left = partial(_some, task), f"no report; both networks are kept in {task.directory}"
    problems += proven(model, small, measured, shown, left)
    latency, late = timed(task, ballast)
    problems += late
    dense, compacted = (cost(network, images.image_shape) for network in (model, small))
    kept = {name: len(filters) for name, filters in keep.items()}
    report = result.report(
        config=task.config.as_dict(),
        environment=environment(task.device, task.precision),
        history=task.history,
        readings=asdict(task.readings),
        judged_on=task.judged_on,
        costs=(dense, compacted),
        sizes=sizes,
        packed=save_packed(task),
        paper_macs=_paper_macs(task, dense, graph),
        accuracies=(accuracy(full, labels), accuracy(reduced, labels)),
        top5=accuracy(reduced, labels, top=5) if len(images.classes) >= MANY_CLASSES else None,
        equivalence=measured,
        kept=kept,
        collapsed=_collapsed(task, kept),
        settled=task.schedule.settled_at,
        tuning=tuned.summary() if tuned else None,
        latency=latency,
        methods=closings(task, small),
        kept_full=task.prunable.kept_full,
        problems=problems,
        train_images=images.counts[0],
    )
    return written(report, task, run)


def shipped(graph: ChannelGraph, keep: Keep, ballast: Keep) -> tuple[nn.Module, dict[str, Any]]:
    """The compact network, and what its file must say for it to be built again without values."""
    analysis = analyse(graph, keep, ballast)
    decided = {name: channels.cpu() for name, channels in analysis.decided.items()}
    return built(analysis), {"decided": decided} | ({"ballast": ballast} if ballast else {})


def closings(task: Task, small: nn.Module) -> dict[str, dict[str, Any]]:
    """What the methods have to say of a run, by their names."""
    said = {getattr(method, "name", ""): method.closing(small) for method in task.methods}
    return {name: values for name, values in said.items() if values}


def written(report: dict[str, Any], task: Task, run: Run) -> dict[str, Any]:
    """The report, once its warnings are said and it is on the disk."""
    for warning in report["warnings"]:
        task.warn(warning)
    run.finish(report, result.markdown(report, str(run.directory)))
    return report


def _paper_macs(task: Task, dense: Cost, graph: ChannelGraph) -> float | None:
    """Reduction of MACs by the papers' closed form, in percent, None where it says nothing."""
    c, rule = task.config, task.schedule.rule
    theirs = (c.residual, c.align, c.macs_target, rule.scope) == ("independent", 1, None, "layer")
    if not theirs or c.threshold is not None or c.latency_target is not None:
        return None
    if not task.schedule.keep:
        return None  # a network without a filter to prune
    filters = {layer.name: layer.filters for layer in dense.layers}
    rates = {name: rule.rate_of(name, c.rate, filters[name]) for name in task.schedule.keep}
    macs = {layer.name: layer.macs for layer in dense.layers}
    return paper_reduction(graph, macs, rates)


def save(task: Task, name: str, network: nn.Module, more: dict[str, Any]) -> int:
    """Write what fpgm.load reads: tensors and plain values. Returns the file's bytes."""
    about = {"arch": task.arch, "keep": task.schedule.keep, **more}
    about |= {"preprocessing": task.images.preprocessing(), "image": list(task.image_shape)}
    weights = {key: value.cpu() for key, value in network.state_dict().items()}
    checkpoint.write(task.directory / name, {**about, "state_dict": weights})
    return (task.directory / name).stat().st_size


def _collapsed(task: Task, kept: Mapping[str, int]) -> list[str]:
    """Layers that one ranking over the network has pruned down to the floor."""
    c = task.config
    ranked = task.schedule.rule.one_ranking
    return at_floor(task.prunable.groups, kept, c.align, c.floor) if ranked else []


def save_packed(task: Task) -> dict[str, Any] | None:
    """Write compact.pt once more in the bits that its weights need, as weights.bN, where N do for
    most. Returns the file's name, its bytes and N; None where there are too many values."""
    content, bits = packing.pack(checkpoint.read(task.directory / "compact.pt"))
    if not bits:
        return None
    path = task.directory / f"weights.b{bits}"
    checkpoint.write(path, {"packed": content})
    return {"file": path.name, "bytes": path.stat().st_size, "bits": bits}


def _some(task: Task) -> Tensor:
    """A few test images (B, C, H, W)."""
    images, _ = next(iter(task.images.tests(64)))
    return images


def proven(
    full: nn.Module,
    small: nn.Module,
    measured: Mapping[str, float],
    images: Callable[[], Tensor],
    kept: str,
) -> list[str]:
    """What is to be said of a difference that compare() has `measured` in float32, if anything.

    A network that cancels large numbers makes rounding larger than the limit; float64, on some
    `images` (B, C, H, W), tells rounding from a mistake. Raises Error where the networks differ;
    kept: what there is all the same.
    """
    if measured["max_abs_diff"] <= FLOAT32 * measured["max_abs_logit"]:
        return []
    said = (
        f"the compact network differs from the zeroed one by {measured['max_abs_diff']:.3g}"
        f" in float32, more than {FLOAT32:g} of the largest output {measured['max_abs_logit']:.3g}"
    )
    doubles = [copy.deepcopy(network).double() for network in (full, small)]
    exact = equivalence(doubles[0], doubles[1], images().double())
    if exact["max_abs_diff"] <= FLOAT64 * exact["max_abs_logit"]:
        return [f"{said}: rounding, by {exact['max_abs_diff']:.1g} in float64"]
    raise Error(f"{said}, and by {exact['max_abs_diff']:.3g} in float64: {kept}")


def timed(task: Task, ballast: Keep) -> tuple[dict[str, Any] | None, list[str]]:
    """How long the networks take that latency_target has led to, beside what was predicted, and a
    line where they miss it or could not be timed; None in other runs."""
    goal = task.goal.latency
    if goal is None:
        return None, []
    target = {"target": goal.target.runtime, "batch": goal.target.batch}
    found = {**target, "threads": goal.target.threads, "asked": goal.share, **task.schedule.latency}
    model = copy.deepcopy(task.full.network).cpu()
    try:
        dense, small = both_apart(model, task.schedule.keep, ballast, goal.target)
    except ShippingError as error:
        return {**found, "final": None}, [f"not timed in the end: {error}"]
    found["final"] = {"dense_ms": dense, "compact_ms": small, "share": small / dense}
    if abs(small / dense / goal.share - 1) <= TOLERANCE:
        return found, []
    return found, [
        f"latency_target={goal.share:g}: the trained network takes {small / dense:.3f} of the time"
    ]


def tune_for(task: Task) -> tuple[tuning.Tuned | None, list[str]]:
    """The fastest form of the task's compact network on its target, a CPU, or what prevented it.

    A trained network is not lost because it could not be timed: it is shipped as cut.
    """
    c = task.config
    runtime = Target(c.target, task.images.image_shape, c.target_batch, torch.get_num_threads())
    model = copy.deepcopy(task.full.network).cpu()
    try:
        return tuning.tune_apart(model, task.schedule.keep, runtime, task.prunable.groups), []
    except ShippingError as error:
        return None, [f"not tuned, and maybe slower than the dense network: {error}"]
