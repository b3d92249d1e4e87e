"""What criteria look at beside the weight, gathered from a network and from data.

Every batch is read once for all criteria that are asked for, in one pass in eval mode: the network
is judged as it is used, and the mean over images does not depend on how they are batched. A
BatchNorm that has seen no data yet (a random start) takes each batch's own statistics instead: with
those it was made with, activations say nothing. Only sums are kept, (N,) for each layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.errors import Error
from fpgm.graph.flow import batch_norms, kept_full, rectifiers
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.networks.modes import evaluating, exact

Evidence = dict[str, dict[str, Tensor]]  # layer -> {keyword of the criterion: (N,) float64}
Batches = Iterable[tuple[Tensor, Tensor]]  # (B, C, H, W) normalised images and (B,) labels

NEEDS = {"bn_gamma": "gamma", "taylor": "sensitivity", "apoz": "zeros", "hrank": "ranks"}
DATA = frozenset({"taylor", "apoz", "hrank"})
_PART = {"bn_gamma": "BatchNorm", "taylor": "BatchNorm", "apoz": "ReLU", "hrank": "ReLU"}

# Singular values are slow, and the mean rank of a filter's maps hardly differs between images
# (the finding that HRank rests on): it is taken over the first of them only.
RANK_IMAGES = 128


def missing(model: nn.Module, name: str, layers: Sequence[str] | None = None) -> list[str]:
    """The layers that a criterion cannot score for want of a BatchNorm or ReLU behind them.

    layers: convolutions, by default all that can be pruned.
    """
    graph = trace(model)
    scored = _scored(graph, name)
    return [layer for layer in _layers(graph, layers) if layer not in scored]


def require(model: nn.Module, name: str, layers: Sequence[str] | None = None) -> None:
    """Raise Error that lists the layers that criterion `name` cannot score."""
    lacking = missing(model, name, layers)
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise Error(
            f"criterion={name}: needs a {_PART[name]} behind each convolution, there is none "
            f"behind {', '.join(lacking[:8])}{more}; criterion=gm takes the weights alone"
        )


def gather(
    model: nn.Module,
    names: Iterable[str],
    batches: Batches | None = None,
    layers: Sequence[str] | None = None,
) -> Evidence:
    """The evidence of the criteria `names`: layer -> {keyword: (N,) float64, on the CPU}.

    batches: on the network's device; read once, at most, and not at all where no criterion in DATA
    is asked for. layers: convolutions, by default all that can be pruned. A layer lacks the
    keyword of a criterion that cannot score it (see `missing`). Weights, statistics, gradients and
    modes of the network are left as they are.
    Raises Error where batches are wanted and there are none, and for what is not finite.
    """
    graph = trace(model)
    wanted = [name for name in NEEDS if name in set(names)]
    found: Evidence = {layer: {} for layer in _layers(graph, layers)}
    if "bn_gamma" in wanted:
        for layer, norm in batch_norms(graph).items():
            if layer in found:
                gamma = graph.module.get_submodule(norm).weight
                assert isinstance(gamma, Tensor)
                found[layer]["gamma"] = gamma.detach().abs().double().cpu()
    if DATA.intersection(wanted):
        with evaluating(model), _unused_norms_in_training(model), exact():
            _read(graph, wanted, batches or (), found)
    for layer, values in found.items():
        for key, value in values.items():
            if not value.isfinite().all():
                raise Error(f"{layer}: its {key} are not finite (NaN or too large)")
    return found


def _layers(graph: ChannelGraph, layers: Sequence[str] | None) -> list[str]:
    if layers is not None:
        return list(layers)
    kept = kept_full(graph)
    return [name for _, name in graph.convolutions() if name not in kept]


def _scored(graph: ChannelGraph, name: str) -> set[str]:
    if name not in NEEDS:
        return {layer for _, layer in graph.convolutions()}
    return set(batch_norms(graph) if _PART[name] == "BatchNorm" else rectifiers(graph))


def _read(graph: ChannelGraph, names: Sequence[str], batches: Batches, found: Evidence) -> None:
    """One pass over the batches; adds to `found` what each layer's ReLU or BatchNorm has summed."""
    relus = {layer: node for layer, node in rectifiers(graph).items() if layer in found}
    norms = {layer: norm for layer, norm in batch_norms(graph).items() if layer in found}
    maps = [name for name in _MAPS if name in names]
    means = {node: {name: _Mean(*_MAPS[name]) for name in maps} for node in relus.values()}
    gates = _Gates(graph, list(dict.fromkeys(norms.values())) if "taylor" in names else [])
    network, read = _Watched(graph.module, means), False
    with torch.set_grad_enabled("taylor" in names), gates:
        for inputs, labels in batches:
            gates.add(network.run(inputs), labels)
            read = True
    if not read:
        asked = ",".join(name for name in names if name in DATA)
        raise Error(f"criterion={asked}: needs images, and there are none")
    for layer, node in relus.items():
        found[layer].update({NEEDS[name]: mean.value() for name, mean in means[node].items()})
    if "taylor" in names:
        for layer, norm in norms.items():
            found[layer]["sensitivity"] = gates.sums[norm].cpu()


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

    def __init__(self, measure: Callable[[Tensor], Tensor], most: int | None = None) -> None:
        self._measure, self._left = measure, most
        self._sum: Tensor | float = 0.0
        self._images = 0

    def add(self, maps: Tensor) -> None:
        if self._left is not None:
            maps = maps[: self._left - self._images]
        if len(maps):
            self._sum = self._sum + self._measure(maps).double().sum(0)
            self._images += len(maps)

    def value(self) -> Tensor:
        assert isinstance(self._sum, Tensor)
        return (self._sum / self._images).cpu()


def _zeros(maps: Tensor) -> Tensor:
    """Share of zeros in each map. A NaN is none, and must not pass for one."""
    share = 1 - maps.count_nonzero((2, 3)).double() / (maps.shape[2] * maps.shape[3])
    return share.masked_fill(maps.sum((2, 3)).isnan(), torch.nan)


def _ranks(maps: Tensor) -> Tensor:
    """Rank of each (H, W) map, with numpy's and torch's usual tolerance."""
    if max(maps.shape[2:]) > 32:  # a GPU's batched decomposition ends there: one by one, slower
        maps = maps.cpu()
    finite = maps.isfinite().flatten(2).all(2)
    ranks: Tensor = torch.linalg.matrix_rank(maps.nan_to_num(0, 0, 0))  # no rank of NaN
    return ranks.double().masked_fill(~finite, torch.nan)


_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {
    "apoz": (_zeros, None),
    "hrank": (_ranks, RANK_IMAGES),
}


class _Gates:
    """Sums of (gamma dL/dgamma + beta dL/dbeta)^2 over minibatches: norm -> (N,). A context."""

    def __init__(self, graph: ChannelGraph, norms: Sequence[str]) -> None:
        modules = [graph.module.get_submodule(norm) for norm in norms]
        self._parameters: list[Any] = [p for m in modules for p in (m.weight, m.bias)]
        self.sums = {
            norm: torch.zeros_like(gamma.detach(), dtype=torch.float64)
            for norm, gamma in zip(norms, self._parameters[::2], strict=True)
        }

    def __enter__(self) -> None:
        self._frozen = [p for p in self._parameters if not p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """One minibatch, (B, classes) and (B,). Nothing is written into any .grad."""
        if not self._parameters:
            return
        loss = F.cross_entropy(outputs, labels)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        products = [
            p.detach().double() * (0 if g is None else g.double())
            for p, g in zip(self._parameters, gradients, strict=True)
        ]
        for norm, of_scale, of_shift in zip(self.sums, products[::2], products[1::2], strict=True):
            self.sums[norm] += (of_scale + of_shift).square()


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
