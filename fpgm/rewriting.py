"""The compact network, written node by node beside the traced original.

A zeroed filter still says something: through its BatchNorm it emits a constant. So every tensor
carries, besides the channels that are still computed (live), the constant value of each channel
that is not. Elementwise operations map constants to constants, an add merges live channels, and
whoever reads constants folds them in: a linear layer into its bias, a zero-padded convolution as
one map that does not depend on the image, so that the borders are right too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from fpgm import operations as ops
from fpgm.channels import Channels
from fpgm.graph import ChannelGraph
from fpgm.layers import BorderConv2d, Expand
from fpgm.overwriting import inplace, out_of_place

Keep = Mapping[str, Tensor]


class Rewriter:
    """Walks a traced network once and writes the compact one beside it.

    `foldings` names the (module, attribute) pairs that hold nothing but folded constants; they
    may be dropped where all of these are zero.
    """

    def __init__(self, graph: ChannelGraph, keep: Keep) -> None:
        self.graph = graph
        self.old: dict[str, nn.Module] = dict(graph.module.named_modules())
        self.keep = graph.checked(keep)
        self.foldings: list[tuple[str, str]] = []
        self._new = fx.Graph()
        self._parts: dict[str, Any] = {}  # modules and tensors of the new network
        self._node: dict[fx.Node, fx.Node] = {}  # old -> new
        self._channels: dict[fx.Node, Channels | None] = {}  # None: not known, at full width

    @torch.no_grad()
    def run(self) -> fx.GraphModule:
        """The compact network, in eval mode, every folding still in place."""
        rules: dict[str, Callable[[fx.Node], Channels | None]] = {
            ops.CONV: self._conv,
            ops.NORM: self._norm,
            ops.LINEAR: self._linear,
            ops.ADD: self._add,
            ops.CAT: self._cat,
            ops.PAD: self._pad,
            ops.ELEMENTWISE: self._elementwise,
            ops.POOL: self._copied,
            ops.SLICE: self._copied,
            ops.FLATTEN: self._copied,
        }
        for node, kind in self.graph.kinds.items():
            self._channels[node] = rules.get(kind, self._opaque)(node)
            if inplace(node, self.old):
                # Nothing is overwritten in the new network, so whoever reads the argument from
                # here on must be given the result.
                overwritten = node.all_input_nodes[0]
                self._node[overwritten] = self._node[node]
                self._channels[overwritten] = self._channels[node]
        return fx.GraphModule(self._parts, self._new).eval()

    def _conv(self, node: fx.Node) -> Channels:
        name = str(node.target)
        old = self.old[name]
        assert isinstance(old, nn.Conv2d)
        inputs = self._input(node, old.in_channels)
        keep = self.keep.get(name, torch.arange(old.out_channels)).to(old.weight.device)
        bordered = not inputs.whole and ops.pads_zeros(old)
        folded = not inputs.whole and not bordered
        options: dict[str, Any] = {k: getattr(old, k) for k in ("stride", "padding", "dilation")}
        options |= {"device": old.weight.device, "dtype": old.weight.dtype}
        new = skip_init(
            BorderConv2d if bordered else nn.Conv2d,
            len(inputs.live),
            len(keep),
            kernel_size=old.kernel_size,
            bias=old.bias is not None or folded,
            padding_mode=old.padding_mode,
            **options,
        )
        new.weight.copy_(old.weight[keep][:, inputs.live])
        bias = torch.zeros_like(old.weight[:, 0, 0, 0]) if old.bias is None else old.bias
        kernel = (old.weight[keep].double() * inputs.constant[:, None, None]).sum(1, keepdim=True)
        if new.bias is not None:
            new.bias.copy_(bias[keep] + (kernel.sum((1, 2, 3)) if folded else 0))
        if bordered:
            new.register_buffer("border", kernel.to(old.weight.dtype))
            self.foldings.append((name, "border"))
        elif folded and old.bias is None:
            self.foldings.append((name, "bias"))
        self._copy(node, new)
        return Channels(old.out_channels, keep, bias.double().index_fill(0, keep, 0))

    def _norm(self, node: fx.Node) -> Channels:
        old = self.old[str(node.target)]
        assert isinstance(old, nn.BatchNorm2d | nn.BatchNorm1d)
        inputs = self._input(node, old.num_features)
        new = copy.deepcopy(old)
        new.num_features = len(inputs.live)
        for name, tensor in [*old.named_parameters(), *old.named_buffers()]:
            if tensor.dim() == 1:
                getattr(new, name).data = tensor.data[inputs.live].clone()
        self._copy(node, new)
        normalise = copy.deepcopy(old).double().eval()
        mean, var = normalise.running_mean, normalise.running_var
        return inputs.map(
            lambda c: F.batch_norm(c, mean, var, normalise.weight, normalise.bias, eps=old.eps)
        )

    def _linear(self, node: fx.Node) -> None:
        name = str(node.target)
        old = self.old[name]
        assert isinstance(old, nn.Linear)
        inputs = self._input(node, old.in_features)
        if inputs.whole:
            self._copy(node)
            return
        options: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        new = skip_init(nn.Linear, len(inputs.live), old.out_features, **options)
        new.weight.copy_(old.weight[:, inputs.live])
        new.bias.copy_(
            old.weight.double() @ inputs.constant + (0 if old.bias is None else old.bias)
        )
        if old.bias is None:
            self.foldings.append((name, "bias"))
        self._copy(node, new)

    def _add(self, node: fx.Node) -> Channels | None:
        a, b = (self._channels[n] for n in node.args if isinstance(n, fx.Node))
        if a is None or b is None or a.total != b.total:
            self._opaque(node)
            return None
        live = torch.cat((a.live, b.live)).unique()
        self._copy(node, inputs=lambda n: self._widened(n, live, node))
        constant = (a.constant + b.constant).index_fill(0, live, 0)
        return Channels(a.total, live, constant)

    def _cat(self, node: fx.Node) -> Channels | None:
        nodes = node.args[0]
        assert isinstance(nodes, list | tuple)
        parts = [self._channels[n] for n in nodes if isinstance(n, fx.Node)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            self._opaque(node)
            return None
        self._copy(node)
        starts = [sum(p.total for p in known[:i]) for i in range(len(known))]
        live = torch.cat([p.live + start for p, start in zip(known, starts, strict=True)])
        return Channels(sum(p.total for p in known), live, torch.cat([p.constant for p in known]))

    def _pad(self, node: fx.Node) -> Channels | None:
        """Channels appended as constants: nobody has to hold them, the node goes."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        channels = self._channels[source]
        if channels is None:
            self._opaque(node)
            return None
        *_, front, back = ops.argument(node, 1, "pad", ())
        value = ops.argument(node, 3, "value", None) or 0.0
        self._node[node] = self._node[source]
        constant = F.pad(channels.constant, (front, back), value=value)
        return Channels(channels.total + front + back, channels.live + front, constant)

    def _elementwise(self, node: fx.Node) -> Channels | None:
        channels = self._copied(node)
        return channels and channels.map(lambda c: ops.apply(node, self.old, c))

    def _copied(self, node: fx.Node) -> Channels | None:
        self._copy(node)
        return self._channels[node.all_input_nodes[0]]

    def _opaque(self, node: fx.Node) -> None:
        """Copied on inputs at full width: whatever it does, it does to the same values."""
        if ops.reads_no_channels(node, self.graph.flat):
            self._copy(node)
        else:
            self._copy(node, inputs=lambda n: self._widened(n, None, node))

    def _input(self, node: fx.Node, size: int) -> Channels:
        """The channels of a node's first argument, of which there are `size`."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        channels = self._channels[source]
        if channels is None:
            device = next(self.graph.module.parameters()).device
            live = torch.arange(size, device=device)
            return Channels(size, live, torch.zeros(size, dtype=torch.float64, device=device))
        return channels if channels.total == size else channels.features(size)

    def _widened(self, source: fx.Node, onto: Tensor | None, reader: fx.Node) -> fx.Node:
        """The new node of `source`, its channels put among `onto` (None: among all there were)."""
        channels = self._channels[source]
        if channels is None or len(channels.live) == (
            channels.total if onto is None else len(onto)
        ):
            return self._node[source]
        onto = torch.arange(channels.total, device=channels.live.device) if onto is None else onto
        dtype = next(self.graph.module.parameters()).dtype
        name = f"{reader.name}_{source.name}_expand"
        positions = torch.searchsorted(onto, channels.live)
        self._parts[name] = Expand(positions, len(onto), channels.constant[onto].to(dtype))
        self.foldings.append((name, "constant"))
        return self._new.call_module(name, (self._node[source],))

    def _copy(
        self,
        node: fx.Node,
        module: nn.Module | None = None,
        inputs: Callable[[fx.Node], fx.Node] | None = None,
    ) -> None:
        """Write the node as it is, but with `module` for its own and nothing overwritten."""
        new = self._new.node_copy(node, inputs or self._node.__getitem__)
        if node.op == "call_module":
            module = copy.deepcopy(self.old[str(node.target)]) if module is None else module
            if hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010
            self._parts[str(node.target)] = module
        elif node.op == "get_attr":
            self._parts[str(node.target)] = attrgetter(str(node.target))(self.graph.module)
        elif inplace(node, self.old):
            other = out_of_place(new)
            if other is not None:
                new.target, new.args, new.kwargs = other
            else:  # it has no twin that is known: let it overwrite a copy
                overwritten = new.all_input_nodes[0]
                with self._new.inserting_before(new):
                    copied = self._new.call_method("clone", (overwritten,))
                new.replace_input_with(overwritten, copied)
        self._node[node] = new
