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

from fpgm.compaction import narrowing
from fpgm.compaction.constants import Channels, Expansion
from fpgm.graph import operations as ops
from fpgm.graph.overwriting import inplace, out_of_place
from fpgm.graph.trace import ChannelGraph
from fpgm.networks.layers import Expand, Pick

Keep = Mapping[str, Tensor]


class Rewriter:
    """Walks a traced network once and writes the compact one beside it.

    emit: convolution -> filters that the compact network has beyond those in `keep`, as zeros:
    they cost MACs, and save an Expand or make a width that runs faster (see fpgm.shipping.tuning).
    `foldings` names the (module, attribute) pairs that hold nothing but folded constants; they
    may be dropped where all of these are zero.
    """

    def __init__(self, graph: ChannelGraph, keep: Keep, emit: Keep | None = None) -> None:
        self.graph = graph
        self.old: dict[str, nn.Module] = dict(graph.module.named_modules())
        self.keep = graph.checked(keep)
        self.emit = graph.checked(emit or {})
        self.foldings: list[tuple[str, str]] = []
        self.expansions: list[Expansion] = []
        self.channels: dict[fx.Node, Channels | None] = {}  # None: not known, at full width
        self._new = fx.Graph()
        self._parts: dict[str, Any] = {}  # modules and tensors of the new network
        self._node: dict[fx.Node, fx.Node] = {}  # old -> new

    @torch.no_grad()
    def run(self) -> fx.GraphModule:
        """The compact network, in eval mode, every folding still in place."""
        rules: dict[str, Callable[[fx.Node], Channels | None]] = {
            ops.CONV: self._conv,
            ops.DEPTHWISE: self._depthwise,
            ops.NORM: self._norm,
            ops.LINEAR: self._linear,
            ops.ADD: self._merge,
            ops.MUL: self._merge,
            ops.CAT: self._cat,
            ops.PAD: self._pad,
            ops.ELEMENTWISE: self._elementwise,
            ops.POOL: self._copied,
            ops.SLICE: self._copied,
            ops.FLATTEN: self._copied,
        }
        for node, kind in self.graph.kinds.items():
            self.channels[node] = rules.get(kind, self._opaque)(node)
            for overwritten in self.graph.overwritten.get(node, ()):
                # Nothing is overwritten in the new network, so whoever reads the argument from
                # here on must be given the result.
                self._node[overwritten] = self._node[node]
                self.channels[overwritten] = self.channels[node]
        small = fx.GraphModule(self._parts, self._new).eval()
        trained = {name: p.requires_grad for name, p in self.graph.module.named_parameters()}
        for name, parameter in small.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))
        return small

    def _conv(self, node: fx.Node) -> Channels:
        name, old, keep, emitted = self._filters(node)
        inputs = self.inputs(node, old.in_channels)
        new, folded = narrowing.convolution(old, inputs, keep, emitted)
        self.foldings += [(name, attribute) for attribute in folded]
        self._copy(node, new)
        return narrowing.written(old, keep, emitted)

    def _depthwise(self, node: fx.Node) -> Channels:
        _, old, keep, emitted = self._filters(node)
        self.channels[node.all_input_nodes[0]] = self.inputs(node, old.in_channels)
        # A constant that is still read becomes an image here: that channel must be there.
        new = narrowing.depthwise(old, keep, emitted)
        self._copy(node, new, lambda n: self._widened(n, emitted, node))
        return narrowing.written(old, keep, emitted)

    def _filters(self, node: fx.Node) -> tuple[str, nn.Conv2d, Tensor, Tensor]:
        """Its name and module, the filters that are kept, and those that the new one has."""
        name = str(node.target)
        old = self.old[name]
        assert isinstance(old, nn.Conv2d)
        keep = self.keep.get(name, torch.arange(old.out_channels))
        emitted = torch.cat((keep, self.emit.get(name, keep))).unique()
        return name, old, keep.to(old.weight.device), emitted.to(old.weight.device)

    def _norm(self, node: fx.Node) -> Channels:
        old = self.old[str(node.target)]
        assert isinstance(old, nn.BatchNorm2d | nn.BatchNorm1d)
        inputs = self.inputs(node, old.num_features)
        self._copy(node, narrowing.norm(old, inputs))
        exact = copy.deepcopy(old).double().eval()
        mean, var = exact.running_mean, exact.running_var
        return inputs.map(
            lambda c: F.batch_norm(c, mean, var, exact.weight, exact.bias, eps=old.eps)
        )

    def _linear(self, node: fx.Node) -> None:
        name = str(node.target)
        old = self.old[name]
        assert isinstance(old, nn.Linear)
        inputs = self.inputs(node, old.in_features)
        if inputs.whole:
            self._copy(node)
            return
        new, folded = narrowing.linear(old, inputs)
        self.foldings += [(name, attribute) for attribute in folded]
        self._copy(node, new)

    def _merge(self, node: fx.Node) -> Channels | None:
        """A sum or a product: it has the channels that either side has."""
        a, b = (self.channels[n] for n in node.args if isinstance(n, fx.Node))
        if a is None or b is None or a.total != b.total:
            self._opaque(node)
            return None
        live = torch.cat((a.live, b.live)).unique()
        self._copy(node, inputs=lambda n: self._widened(n, live, node))
        product = self.graph.kinds[node] == ops.MUL
        constant = a.constant * b.constant if product else a.constant + b.constant
        return Channels(a.total, live, constant)

    def _cat(self, node: fx.Node) -> Channels | None:
        nodes = node.args[0]
        assert isinstance(nodes, list | tuple)
        parts = [self.channels[n] for n in nodes if isinstance(n, fx.Node)]
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
        channels = self.channels[source]
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
        return self.channels[node.all_input_nodes[0]]

    def _opaque(self, node: fx.Node) -> None:
        """Copied on inputs at full width: whatever it does, it does to the same values."""
        if ops.reads_no_channels(node, self.graph.flat):
            self._copy(node)
        else:
            self._copy(node, inputs=lambda n: self._widened(n, None, node))

    def inputs(self, node: fx.Node, size: int) -> Channels:
        """The channels of a node's first argument, of which there are `size`."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        channels = self.channels[source]
        if channels is None:
            device = next(self.graph.module.parameters()).device
            live = torch.arange(size, device=device)
            varying = torch.full((size,), torch.nan, dtype=torch.float64, device=device)
            return Channels(size, live, varying)
        return channels if channels.total == size else channels.features(size)

    def _widened(self, source: fx.Node, onto: Tensor | None, reader: fx.Node) -> fx.Node:
        """The new node of `source` with just the channels `onto` (None: all that there were)."""
        channels, node = self.channels[source], self._node[source]
        if channels is None:
            return node
        onto = torch.arange(channels.total, device=channels.live.device) if onto is None else onto
        name = f"{reader.name}_{source.name}"
        wanted = torch.isin(channels.live, onto)
        if not wanted.all():
            self._parts[f"{name}_pick"] = Pick(wanted.nonzero().squeeze(1))
            node = self._new.call_module(f"{name}_pick", (node,))
        live = channels.live[wanted]
        if len(live) < len(onto):
            constant = channels.absent[onto].to(next(self.graph.module.parameters()).dtype)
            positions = torch.searchsorted(onto, live)
            missing = onto[~torch.isin(onto, live)].cpu()
            self.expansions.append(Expansion(reader, source, missing, channels.total))
            self._parts[f"{name}_expand"] = Expand(positions, len(onto), constant)
            self.foldings.append((f"{name}_expand", "constant"))
            node = self._new.call_module(f"{name}_expand", (node,))
        return node

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
            # Under a name of its own: the module that it belongs to may get narrower.
            new.target = f"read_{str(node.target).replace('.', '_')}"
            value = attrgetter(str(node.target))(self.graph.module)
            self._parts[new.target] = copy.deepcopy(value)
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
