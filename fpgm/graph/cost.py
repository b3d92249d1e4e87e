"""What a network costs, counted while it runs: multiply-accumulates and parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fpgm.graph import operations as ops
from fpgm.graph.flow import kept_full
from fpgm.graph.trace import ChannelGraph
from fpgm.networks.layers import BorderConv2d, BorderMap
from fpgm.networks.modes import evaluating


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or a matrix product. filters: its outputs; macs: for one image.

    name: the layer, or the module that calls it as a function, with the operation where it is no
    layer: `encoder.bmm`, `encoder.bmm_1`.
    """

    name: str
    filters: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """macs: multiply-accumulates of convolutions and matrix products for one image.

    macs_per_batch: done once however many images a batch has (the maps of constant channels);
    params: parameters, and the constants that compaction folded in.
    """

    macs: int
    macs_per_batch: int
    params: int
    layers: tuple[Layer, ...]


def cost(model: nn.Module, image: tuple[int, int, int]) -> Cost:
    """Count a network on one image of shape (C, H, W). The network is left as it is."""
    parameter = next(model.parameters())
    x = torch.zeros(1, *image, dtype=parameter.dtype, device=parameter.device)
    # Without gradients and yet not in inference mode, in which torch hands on whole operations.
    with evaluating(model), torch.no_grad(), _Counter(model) as counter, counter.watching():
        _Watched(model, counter).run(x) if isinstance(model, fx.GraphModule) else model(x)
    constants = [b for n, b in model.named_buffers() if n.endswith((".border", ".constant"))]
    params = sum(t.numel() for t in [*model.parameters(), *constants])
    macs = sum(layer.macs for layer in counter.layers)
    return Cost(macs, counter.per_batch, params, tuple(counter.layers))


class _Counter(TorchDispatchMode):
    """Sees every operation that torch runs, whoever calls it, and counts as torch's own counter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[Layer] = []
        self.per_batch = 0
        self.callers: list[tuple[str, type]] = []  # modules that are running, the innermost last
        self._modules = dict(model.named_modules())
        # A layer that is called as a function has the name that the graph gives it.
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._weights = {_memory(tensor): _layer(name) for name, tensor in tensors}
        self._formulas = FlopCounterMode(display=False).flop_registry
        self._calls: Counter[str] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module is running."""

        def leave(*_: object) -> None:
            self.callers.pop()

        hooks = []
        for name, module in self._modules.items():
            caller = (name, type(module))
            enter = module.register_forward_pre_hook(lambda *_, c=caller: self.callers.append(c))
            hooks += [enter, module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            macs = formula(*args, **(kwargs or {}), out_val=output) // 2
            self._count(func.overloadpacket.__name__, args, output, macs)
        return output

    def _function(self, caller: str, operation: str, args: Any) -> str:
        """The name of a convolution or matrix product that no layer of torch's own calls."""
        tensors = (a for a in args[1:] if isinstance(a, Tensor))
        known = next((self._weights[m] for m in map(_memory, tensors) if m in self._weights), None)
        name = known or (f"{caller}.{operation}" if caller else operation)
        self._calls[name] += 1
        return f"{name}_{self._calls[name] - 1}" if self._calls[name] > 1 else name

    def _count(self, operation: str, args: Any, output: Tensor, macs: int) -> None:
        name, kind = self.callers[-1]
        if kind in (BorderConv2d, BorderMap) and args[1] is self._modules[name].border:
            self.per_batch += macs
            return
        if not issubclass(kind, nn.Conv2d | nn.Linear):
            name = self._function(name, operation, args)
        filters = output.shape[1 if "conv" in operation else -1]
        self.layers.append(Layer(name, filters, macs))


def _memory(tensor: Tensor) -> tuple[int, int, int]:
    """Where a tensor lies, the same for its transpose."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()


def _layer(parameter: str) -> str:
    """The name of the layer whose weight it is, see graph.canonical."""
    holder, _, attribute = parameter.removeprefix("read_").rpartition(".")
    return holder if holder and attribute == "weight" else parameter.removeprefix("read_")


class _Watched(fx.Interpreter):
    """Runs a traced network, in which what a module called as a function is nobody's any more."""

    def __init__(self, model: fx.GraphModule, counter: _Counter) -> None:
        super().__init__(model)
        self._counter = counter

    def run_node(self, n: fx.Node) -> Any:
        modules = list(n.meta.get("nn_module_stack", {}).values())
        self._counter.callers.append(modules[-1] if modules else ("", nn.Module))
        try:
            return super().run_node(n)
        finally:
            self._counter.callers.pop()


def paper_reduction(
    graph: ChannelGraph, layers: Mapping[str, int], rates: Mapping[str, float]
) -> float | None:
    """The papers' closed form: percent of MACs saved at fractional rates, or None.

    layers: convolution -> dense MACs; rates: convolution -> P_i, those it does not name are whole.
    A convolution counts 1 - P_i, times 1 - P_j if it reads a pruned convolution j directly; a
    residual stream counts as full. Linear layers are not counted. None where channels are
    concatenated or reach a convolution through an operation that is not understood: the papers
    have no form for that.
    """
    kept = 0.0
    if any(graph.kinds[node] == ops.DEPTHWISE for node, _ in graph.convolutions()) or (
        set(kept_full(graph)) - {name for _, name in graph.convolutions()}
    ):
        return None  # depthwise, grouped or shared convolutions
    for node, name in graph.convolutions():
        source = _writer(node.all_input_nodes[0], graph)
        kind = graph.kinds[source]
        if kind not in (ops.CONV, ops.ADD) and source.op != "placeholder":
            return None
        read = rates.get(str(source.target), 0.0) if kind == ops.CONV else 0.0
        kept += layers[name] * (1 - read) * (1 - rates.get(name, 0.0))
    return 100 * (1 - kept / sum(layers[name] for _, name in graph.convolutions()))


def _writer(node: fx.Node, graph: ChannelGraph) -> fx.Node:
    """The nearest node above that decides about channels: a convolution, add, cat, ..."""
    while graph.kinds[node] in (ops.NORM, ops.ELEMENTWISE, ops.POOL, ops.SLICE, ops.FLATTEN):
        node = node.all_input_nodes[0]
    return node
