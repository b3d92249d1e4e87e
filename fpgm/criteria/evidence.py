"""What criteria look at beside the weight, gathered from a network and from data.

Every batch is read once for all criteria that are asked for, in one pass in eval mode: the network
is judged as it is used, and the mean over images does not depend on how they are batched. A
BatchNorm that has seen no data yet (a random start) takes each batch's own statistics instead: with
those it was made with, activations say nothing. Only sums are kept, (N,) for each layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.criteria.criterion import Criterion, named
from fpgm.criteria.views import Gate, Maps, Scale
from fpgm.errors import Error
from fpgm.graph.flow import batch_norms, kept_full, rectifiers
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.graph.tracer import Image
from fpgm.networks.modes import evaluating, exact

Evidence = dict[str, dict[str, Tensor]]  # layer -> {parameter of the criterion: (N,) float64}
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
) -> Evidence:
    """The evidence of the criteria `names`: layer -> {parameter: (N,) float64, on the CPU}.

    batches: on the network's device; read once, at most, and not at all where no criterion asked
    for reads images. layers: by default all that can be pruned; image: see fpgm.select. A layer
    lacks the parameter of a criterion that cannot score it (see `missing`). Weights, statistics,
    gradients and modes of the network are left as they are.
    Raises Error where batches are wanted and there are none, and for what is not finite.
    """
    graph = trace(model, image)
    criteria = [named(name) for name in dict.fromkeys(names)]
    evidence: Evidence = {layer: {} for layer in _layers(graph, layers)}
    for parameter in _parameters(criteria, Scale):
        for layer, norm in batch_norms(graph).items():
            if layer in evidence:
                gamma = graph.module.get_submodule(norm).weight
                assert isinstance(gamma, Tensor)
                evidence[layer][parameter] = gamma.detach().abs().double().cpu()
    if any(criterion.reads_images for criterion in criteria):
        # Layers that the graph has in another form are its own, and of the same tensors.
        with evaluating(model, graph.module), _unused_norms_in_training(graph.module), exact():
            _read(graph, criteria, batches or (), evidence)
    for layer, values in evidence.items():
        for parameter, value in values.items():
            if not value.isfinite().all():
                raise Error(f"{layer}: its {parameter} are not finite (NaN or too large)")
    return evidence


def _parameters(criteria: Iterable[Criterion], kind: type) -> dict[str, Any]:
    """Parameter -> view, of all views of one kind."""
    views = (item for criterion in criteria for item in criterion.views.items())
    return {parameter: view for parameter, view in views if isinstance(view, kind)}


def _layers(graph: ChannelGraph, layers: Sequence[str] | None) -> list[str]:
    if layers is not None:
        return list(layers)
    kept = kept_full(graph)
    return [name for _, name in graph.writers() if name not in kept]


def _scored(graph: ChannelGraph, criterion: Criterion) -> set[str]:
    if criterion.needs_part is None:
        return {layer for _, layer in graph.writers()}
    return set(batch_norms(graph) if criterion.needs_part == "BatchNorm" else rectifiers(graph))


def _read(
    graph: ChannelGraph, criteria: Sequence[Criterion], batches: Batches, evidence: Evidence
) -> None:
    """One pass over the batches; adds to `evidence` what each layer's ReLU or BatchNorm has
    summed."""
    relus = {layer: node for layer, node in rectifiers(graph).items() if layer in evidence}
    norms = {layer: norm for layer, norm in batch_norms(graph).items() if layer in evidence}
    maps: dict[str, Maps] = _parameters(criteria, Maps)
    # Several convolutions may come to one ReLU: its maps are measured once.
    means = {
        node: {parameter: _Mean(view.measure) for parameter, view in maps.items()}
        for node in relus.values()
    }
    gates = _Gates(graph, list(dict.fromkeys(norms.values())), _parameters(criteria, Gate))
    network, read = _Watched(graph.module, means), False
    with torch.set_grad_enabled(gates.wanted), gates:
        for inputs, labels in batches:
            gates.add(network.run(inputs), labels)
            read = True
    if not read:
        names = ",".join(criterion.name for criterion in criteria if criterion.reads_images)
        raise Error(f"criterion={names}: needs images, and there are none")
    for layer, node in relus.items():
        for parameter, mean in means[node].items():
            evidence[layer][parameter] = mean.value()
    for layer, norm in norms.items():
        for parameter, sums in gates.sums.items():
            evidence[layer][parameter] = sums[norm].cpu()


class _Watched(fx.Interpreter):
    """Runs the graph and shows what the watched nodes give: at once, as a later operation may
    overwrite it."""

    def __init__(self, module: fx.GraphModule, watched: dict[fx.Node, dict[str, _Mean]]) -> None:
        super().__init__(module)
        self._watched = watched

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for mean in self._watched.get(n, {}).values():
            mean.add(result.detach())
        return result


class _Mean:
    """The mean over images of what `measure` makes of feature maps, (B, C, H, W) -> (B, C)."""

    def __init__(self, measure: Callable[[Tensor], Tensor]) -> None:
        self._measure = measure
        self._sum: Tensor | float = 0.0
        self._images = 0

    def add(self, maps: Tensor) -> None:
        self._sum = self._sum + self._measure(maps).double().sum(0)
        self._images += len(maps)

    def value(self) -> Tensor:
        assert isinstance(self._sum, Tensor)
        return (self._sum / self._images).cpu()


class _Gates:
    """Sums over minibatches of what views make of (gamma dL/dgamma + beta dL/dbeta), which is dL/dz
    of a gate z = 1 on a BatchNorm's output: parameter -> norm -> (N,). A context."""

    def __init__(
        self, graph: ChannelGraph, norms: Sequence[str], views: Mapping[str, Gate]
    ) -> None:
        modules = [graph.module.get_submodule(norm) for norm in norms]
        self._norms, self._views = norms, views
        self._affine: list[Any] = [p for m in modules for p in (m.weight, m.bias)]
        zeros = [torch.zeros_like(p.detach(), dtype=torch.float64) for p in self._affine[::2]]
        self.sums = {
            parameter: {n: z.clone() for n, z in zip(norms, zeros, strict=True)}
            for parameter in views
        }

    @property
    def wanted(self) -> bool:
        """Whether any view looks at a gate, so that gradients are needed."""
        return bool(self._views)

    def __enter__(self) -> None:
        # A gradient by frozen parameters is wanted as well: their values stay as they are.
        self._frozen = [p for p in self._affine if not p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """One minibatch, (B, classes) and (B,). Nothing is written into any .grad."""
        if not self._views or not self._affine:
            return
        loss = F.cross_entropy(outputs, labels)
        gradients = torch.autograd.grad(loss, self._affine, allow_unused=True)
        products = [
            p.detach().double() * (0 if g is None else g.double())
            for p, g in zip(self._affine, gradients, strict=True)
        ]
        for norm, by_scale, by_shift in zip(
            self._norms, products[::2], products[1::2], strict=True
        ):
            for parameter, view in self._views.items():
                self.sums[parameter][norm] += view.measure(by_scale + by_shift)


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
