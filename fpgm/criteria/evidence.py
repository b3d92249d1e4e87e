"""What criteria look at beside the weight, gathered from a network and from data.

Every batch is read once for all criteria that are asked for, in one pass in eval mode: the network
is judged as it is used, and the mean over images does not depend on how they are batched. A
BatchNorm that has seen no data yet (a random start) takes each batch's own statistics instead: with
those it was made with, activations say nothing. What is
gathered, and how, is up to the criteria's views.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.criteria.criterion import Criterion, named
from fpgm.criteria.views import Collector, View
from fpgm.errors import Error
from fpgm.graph.flow import kept_full
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.graph.tracer import Image
from fpgm.networks.modes import evaluating, exact

Evidence = dict[str, dict[str, Tensor]]  # layer -> {parameter of the criterion: (N, ...) float64}
Batches = Iterable[tuple[Tensor, Tensor]]  # (B, C, H, W) normalised images and (B,) labels


def missing(
    model: nn.Module, name: str, layers: Sequence[str] | None = None, image: Image | None = None
) -> list[str]:
    """The layers that a criterion cannot score for want of a BatchNorm or ReLU behind them.

    layers: convolutions, by default all that can be pruned; image: see fpgm.select.
    """
    graph = trace(model, image)
    scored = _scored(graph, named(name))
    return [layer for layer in _layers(graph, layers) if layer not in scored]


def require(
    model: nn.Module, name: str, layers: Sequence[str] | None = None, image: Image | None = None
) -> None:
    """Raise Error that lists the layers that criterion `name` cannot score."""
    lacking = missing(model, name, layers, image)
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise Error(
            f"criterion={name}: needs a {named(name).needs_part} behind each convolution, there is "
            f"none behind {', '.join(lacking[:8])}{more}; criterion=gm takes the weights alone"
        )


def gather(
    model: nn.Module,
    names: Iterable[str],
    batches: Batches | None = None,
    layers: Sequence[str] | None = None,
    image: Image | None = None,
    **options: Any,
) -> Evidence:
    """The evidence of the criteria `names`: layer -> {parameter: (N, ...) float64, on the CPU}.

    batches: on the network's device; read once, at most, and not at all where no criterion asked
    for reads images. layers: by default all that can be pruned; image: see fpgm.select; options:
    of the criteria, for those that say what is gathered. A layer lacks the parameter of a criterion
    that cannot score it (see `missing`). Weights, statistics, gradients and modes of the network
    are left as they are.
    Raises Error where batches or the image's size are wanted and there are none, and for what is
    not finite.
    """
    graph = trace(model, image)
    wanted = _layers(graph, layers)
    criteria = [named(name) for name in dict.fromkeys(names)]
    views = _views(criteria, options)
    collectors = {
        parameter: view.collector(graph, [n for n in wanted if n in view.scored(graph)], image)
        for parameter, view in views.items()
    }
    evidence: Evidence = {layer: {} for layer in wanted}
    reading = [criterion.name for criterion in criteria if criterion.reads_images]
    showing = {p: c for p, c in collectors.items() if views[p].reads_images}
    differentiates = any(view.differentiates for view in views.values())
    found: dict[str, Mapping[str, Tensor]] = {}
    # Before any image is read: that moves the statistics of a BatchNorm that has seen none.
    with evaluating(model, graph.module), exact():
        found.update((p, c.values()) for p, c in collectors.items() if p not in showing)
    with _looked_at(model, graph):
        if reading and not _shown(graph, [*showing.values()], batches or (), differentiates):
            raise Error(f"criterion={','.join(reading)}: needs images, and there are none")
        found.update((p, c.values()) for p, c in showing.items())
    for parameter, values in found.items():
        for layer, value in values.items():
            evidence[layer][parameter] = value
    for layer, values in evidence.items():
        for parameter, value in values.items():
            if not value.isfinite().all():
                raise Error(f"{layer}: its {parameter} are not finite (NaN or too large)")
    return evidence


def _layers(graph: ChannelGraph, layers: Sequence[str] | None) -> list[str]:
    if layers is not None:
        return list(layers)
    kept = kept_full(graph)
    return [name for _, name in graph.writers() if name not in kept]


def _scored(graph: ChannelGraph, criterion: Criterion) -> set[str]:
    scored = {layer for _, layer in graph.writers()}
    return scored.intersection(*(view.scored(graph) for view in criterion.views.values()))


def _views(criteria: Iterable[Criterion], options: Mapping[str, Any]) -> dict[str, View]:
    """By parameter. Raises Error where two criteria mean different things by one name."""
    views: dict[str, View] = {}
    for criterion in criteria:
        for parameter, declared in criterion.views.items():
            view = declared.given(options)
            if views.setdefault(parameter, view) != view:
                raise Error(
                    f"criterion={criterion.name}: what it calls {parameter} is something else to "
                    "another criterion; give it a name of its own, or gather them one by one"
                )
    return views


def look(model: nn.Module, graph: ChannelGraph, collector: Collector, batches: Batches) -> bool:
    """Show every batch to a collector that needs no gradients, as `gather` does. graph: the
    model's. Returns whether there were any."""
    with _looked_at(model, graph):
        return _shown(graph, [collector], batches, False)


@contextlib.contextmanager
def _looked_at(model: nn.Module, graph: ChannelGraph) -> Iterator[None]:
    """The network as it is judged; nothing of it has changed afterwards."""
    # Layers that the graph has in another form are its own, and of the same tensors.
    with evaluating(model, graph.module), _unused_norms_in_training(graph.module), exact():
        yield


def _shown(
    graph: ChannelGraph, collectors: Sequence[Collector], batches: Batches, differentiates: bool
) -> bool:
    """One pass over the batches, shown to all collectors. Returns whether there were any."""
    network, read = _Watched(graph.module, collectors), False
    with _differentiable(graph.module) if differentiates else torch.no_grad():
        for inputs, labels in batches:
            read = True
            _differentiate(collectors, network.run(inputs), labels)
    return read


def _differentiate(collectors: Sequence[Collector], outputs: Tensor, labels: Tensor) -> None:
    """Hand each collector the gradients that it asks for. Nothing is written into any .grad."""
    sources = [list(collector.sources()) for collector in collectors]
    # Of several that ask for the same tensor it is computed once.
    wanted = {id(tensor): tensor for own in sources for tensor in own}
    gradients: dict[int, Tensor | None] = {}
    if wanted:
        loss = F.cross_entropy(outputs, labels)
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        gradients = dict(zip(wanted, found, strict=True))
    for collector, own in zip(collectors, sources, strict=True):
        collector.add([gradients[id(tensor)] for tensor in own])


class _Watched(fx.Interpreter):
    """Runs the graph and shows what the watched operations give. The network goes on with a copy,
    as a later operation may overwrite it: values and gradients stay those of this place."""

    def __init__(self, module: fx.GraphModule, collectors: Sequence[Collector]) -> None:
        super().__init__(module)
        self._watching = {
            node: [c for c in collectors if node in c.watched]
            for collector in collectors
            for node in collector.watched
        }
        self._entering = {
            node: [c for c in collectors if node in c.entered]
            for collector in collectors
            for node in collector.entered
        }

    def run_node(self, n: fx.Node) -> Any:
        for collector in self._entering.get(n, ()):
            collector.enter(n, self.env[n.all_input_nodes[0]])
        result = super().run_node(n)
        if n not in self._watching:
            return result
        if torch.is_grad_enabled() and not result.requires_grad:
            result.requires_grad_()  # nothing that is trained lies before it
        for collector in self._watching[n]:
            collector.see(n, result)
        return result.clone() if torch.is_grad_enabled() else result


@contextlib.contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Gradients, by frozen parameters as well: their values stay as they are."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def _unused_norms_in_training(model: nn.Module) -> Iterator[None]:
    """BatchNorms that have seen no batch yet take each batch's statistics; nothing stays of it."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    unused = [m for m in norms if _as_made(m)]
    before = [(b, b.clone()) for module in unused for b in module.buffers()]
    try:
        for module in unused:
            module.training = True
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _as_made(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return False
    return not mean.any() and bool((variance == 1).all())
