"""The compact network, written node by node beside the traced original.

What each node has and what its readers need is known beforehand (constants.analyse); here layers
get narrower, Picks and Expands stand where the analysis says, and nothing is overwritten any more.
"""

from __future__ import annotations

import copy
import operator
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from fpgm.compaction import narrowing
from fpgm.compaction.constants import Analysis
from fpgm.graph import operations as ops
from fpgm.networks.layers import Expand, Pick

Folding = tuple[str, str]  # module, and its attribute that holds nothing but folded constants


def rewrite(analysis: Analysis) -> tuple[fx.GraphModule, list[Folding]]:
    """The compact network, in eval mode, every folding still in place, and which there are.

    A folding may be dropped where all of it is zero.
    """
    return _Rewriter(analysis).run()


class _Rewriter:
    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._graph = analysis.graph
        self._old: dict[str, nn.Module] = dict(analysis.graph.module.named_modules())
        self._device = next(analysis.graph.module.parameters()).device
        self._foldings: list[Folding] = []
        self._new = fx.Graph()
        self._parts: dict[str, Any] = {}  # modules and tensors of the new network
        self._node: dict[fx.Node, fx.Node] = {}  # old -> new

    @torch.no_grad()
    def run(self) -> tuple[fx.GraphModule, list[Folding]]:
        for node, kind in self._graph.kinds.items():
            known = self._analysis.flow.written[node] is not None
            if kind == ops.PAD and known:
                # Channels appended as constants: nobody has to hold them, the node goes.
                self._node[node] = self._node[node.all_input_nodes[0]]
            elif kind == ops.CHOOSE:
                self._node[node] = self._chosen(node)
            else:
                self._copy(node, self._narrowed(node, kind))
            for overwritten in self._graph.overwritten.get(node, ()):
                # Nothing is overwritten in the new network, so whoever reads the argument from
                # here on must be given the result.
                self._node[overwritten] = self._node[node]
        small = fx.GraphModule(self._parts, self._new).eval()
        trained = {name: p.requires_grad for name, p in self._graph.module.named_parameters()}
        for name, parameter in small.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))
        return small, self._foldings

    def _narrowed(self, node: fx.Node, kind: str) -> nn.Module | None:
        """The module that a node calls in the compact network, None where it calls none."""
        old = self._graph.called(node)
        narrowed = (*ops.WRITERS, ops.NORM, ops.SLOPE, ops.LINEAR, ops.FIXED)
        if old is None or kind not in narrowed:
            return copy.deepcopy(old)
        if kind == ops.FIXED:
            written = self._analysis.flow.written[node]
            assert isinstance(old, nn.Conv2d)
            return (
                copy.deepcopy(old)
                if written is None
                else narrowing.depthwise(old, written.live, written.live)
            )
        name, inputs = str(node.target), self._analysis.inputs(node)
        folded: list[str] = []
        new: nn.Module
        if isinstance(old, nn.Conv2d):
            kept, emitted = self._analysis.kept[name], self._analysis.emitted[name]
            if kind != ops.DEPTHWISE:
                carrier = self._analysis.carriers.get(name)
                new, folded = narrowing.convolution(old, inputs, kept, emitted, carrier)
            else:
                new = narrowing.depthwise(old, kept, emitted)
        elif isinstance(old, nn.Linear):
            everything = torch.arange(old.out_features, device=old.weight.device)
            kept = self._analysis.kept.get(name, everything)
            emitted = self._analysis.emitted.get(name, everything)
            new, folded = narrowing.linear(old, inputs, kept, emitted)
        elif isinstance(old, nn.PReLU):
            new = narrowing.slope(old, inputs)
        else:
            assert isinstance(old, nn.BatchNorm2d | nn.BatchNorm1d)
            new = narrowing.norm(old, inputs)
        self._foldings += [(name, attribute) for attribute in folded]
        return new

    def _chosen(self, node: fx.Node) -> fx.Node:
        """The live ones of the channels that a node chooses: in a row, or one by one."""
        source, flow = node.all_input_nodes[0], self._analysis.flow
        inputs, outputs = flow.read[node][source], flow.written[node]
        new = self._fitted(node, source)
        places = torch.tensor(node.args[1])
        if inputs is not None and outputs is not None:
            expansion = self._analysis.expansions.get((node, source))
            there = (inputs.live if expansion is None else expansion.onto).cpu()
            places = torch.searchsorted(there, places[outputs.live.cpu()])
            if torch.equal(places, torch.arange(len(there))):
                return new
        first, last = int(places[0]), int(places[-1]) + 1
        if first < last and torch.equal(places, torch.arange(first, last)):
            part = (slice(None), slice(first, last))
            return self._new.call_function(operator.getitem, (new, part))
        self._parts[f"{node.name}_pick"] = Pick(places.to(self._device))
        return self._new.call_module(f"{node.name}_pick", (new,))

    def _copy(self, node: fx.Node, module: nn.Module | None) -> None:
        """Write the node as it is, but with `module` for the old one and nothing overwritten."""
        new = self._new.node_copy(node, lambda source: self._fitted(node, source))
        if module is not None:
            if hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010
            self._parts[str(node.target)] = module
        elif node.op == "get_attr":
            # Under another name: the module that it belongs to may get narrower.
            new.target = f"read_{str(node.target).replace('.', '_')}"
            value = attrgetter(str(node.target))(self._graph.module)
            self._parts[new.target] = copy.deepcopy(value)
        elif ops.inplace(node, self._old):
            twin = ops.out_of_place(new)
            if twin is not None:
                new.target, new.args, new.kwargs = twin
            else:  # it has no twin that is known: let it overwrite a copy
                overwritten = new.all_input_nodes[0]
                with self._new.inserting_before(new):
                    copied = self._new.call_method("clone", (overwritten,))
                new.replace_input_with(overwritten, copied)
        self._node[node] = new

    def _fitted(self, reader: fx.Node, source: fx.Node) -> fx.Node:
        """The new node of `source` with just the channels that `reader` needs."""
        node = self._node[source]
        expansion = self._analysis.expansions.get((reader, source))
        if expansion is None:
            return node
        name = f"{reader.name}_{source.name}"
        picked, live, onto = expansion.picked, expansion.channels.live, expansion.onto
        if not picked.all():
            self._parts[f"{name}_pick"] = Pick(picked.nonzero().squeeze(1))
            node = self._new.call_module(f"{name}_pick", (node,))
        if len(expansion.missing):
            constant = expansion.channels.absent[onto]
            constant = constant.to(next(self._graph.module.parameters()).dtype)
            positions = torch.searchsorted(onto, live[picked])
            self._parts[f"{name}_expand"] = Expand(positions, len(onto), constant)
            self._foldings.append((f"{name}_expand", "constant"))
            node = self._new.call_module(f"{name}_expand", (node,))
        return node
