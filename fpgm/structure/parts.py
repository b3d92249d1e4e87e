"""A network taken apart by what pruning can do with it: its groups, what stays whole, the rest.

Every multiply-accumulate stands in one of the three.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from fpgm.compaction.compact import compact
from fpgm.graph import operations as ops
from fpgm.graph.cost import Cost, cost
from fpgm.graph.flow import follow
from fpgm.graph.groups import RESIDUAL, Group, Prunable, prunable
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.graph.worth import Filters, Writers, worths
from fpgm.selection.select import select
from fpgm.structure.places import Place, place
from fpgm.structure.subject import Image, Subject

# Operations that tie channels, in the words of a table.
TIES = {ops.ADD: "add", ops.MUL: "product", ops.DEPTHWISE: "depthwise", ops.GROUPED: "grouped"}


@dataclass(frozen=True)
class Bundle:
    """Channels that are decided in one ranking. layers: in the order of execution; ties: what makes
    them one, empty for the filters of a single layer; macs: of its filters, for one image;
    per_channel: MACs that go when a channel goes, those of its readers included."""

    number: int
    layers: tuple[str, ...]
    channels: int
    ties: tuple[str, ...]
    macs: float
    per_channel: float


@dataclass(frozen=True)
class Whole:
    """A convolution that is not pruned. place: the line where it is called, or that of the
    operation which its channels must not be missing for."""

    layer: str
    filters: int
    reason: str
    macs: int
    place: Place | None


@dataclass(frozen=True)
class Structure:
    """others: what is no convolution, by name -> MACs; rate, after: what a rate comes to, where it
    was tried."""

    name: str
    image: Image
    residual: str
    ignore: tuple[str, ...]
    dense: Cost
    bundles: tuple[Bundle, ...]
    whole: tuple[Whole, ...]
    others: dict[str, int]
    graph: ChannelGraph
    rate: float = 0.0
    after: Cost | None = None

    @property
    def prunable(self) -> float:
        """MACs of the filters that may go."""
        return sum(bundle.macs for bundle in self.bundles)

    def share(self, macs: float) -> float:
        """In percent of the network's."""
        return 100 * macs / self.dense.macs if self.dense.macs else 0.0


def take_apart(
    subject: Subject, image: Image, residual: str = RESIDUAL[0], ignore: Sequence[str] = ()
) -> Structure:
    """What of a network can be pruned, on images of (C, H, W). Raises Error."""
    model = subject.model
    graph = trace(model, image)
    tied = prunable(graph, residual, ignore)
    dense = cost(model, image)
    macs: Counter[str] = Counter()
    for layer in dense.layers:
        macs[layer.name] += layer.macs
    bundles = _bundles(graph, tied.groups, dense, macs)
    whole = _whole(model, graph, tied, macs)
    named = {*tied.layers, *(one.layer for one in whole)}
    others = {name: count for name, count in macs.items() if name not in named}
    return Structure(
        subject.name, image, residual, tuple(ignore), dense, bundles, whole, others, graph
    )


def tried(structure: Structure, model: nn.Module, rate: float) -> Structure:
    """The same with what is left of the network, by the default criterion, at this rate of every
    layer. Raises Error."""
    ignore, image = structure.ignore, structure.image
    keep = select(model, rate=rate, residual=structure.residual, ignore=ignore, image=image)
    small = compact(model, keep, image=image)
    return replace(structure, rate=rate, after=cost(small, structure.image))


def _bundles(
    graph: ChannelGraph, groups: Sequence[Group], dense: Cost, macs: Counter[str]
) -> tuple[Bundle, ...]:
    calls = {name: index for index, name in enumerate(_calls(graph))}

    def order(name: str) -> int:
        return calls.get(name, len(calls))

    widths: Counter[str] = Counter()  # a layer of several groups is divided among them
    for group in groups:
        widths.update(group.filters)
    found = [
        (
            tuple(sorted(group.filters, key=order)),
            len(group),
            ties,
            sum(macs[name] * count / widths[name] for name, count in group.filters.items()),
            worth.macs,
        )
        for group, ties, worth in zip(
            groups, _ties(graph, groups), worths(graph, groups, dense), strict=True
        )
    ]
    found.sort(key=lambda row: order(row[0][0]))
    return tuple(Bundle(number, *row) for number, row in enumerate(found, 1))


def _calls(graph: ChannelGraph) -> dict[str, fx.Node]:
    """Layer -> the node that calls it, in the order of execution."""
    return {str(n.target): n for n in graph.kinds if n.op == "call_module"}


def _ties(graph: ChannelGraph, groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """What makes the layers of each group one: the words of TIES, in their order."""
    owner = {
        (name, int(index)): number
        for number, group in enumerate(groups)
        for name, filters in group.members
        for index in filters
    }
    kinds: list[set[str]] = [set() for _ in groups]
    flow = follow(graph, Writers(graph))

    def groups_of(writers: Filters) -> set[int]:
        return {owner[writer] for writer in writers if writer in owner}

    for node, kind in graph.kinds.items():
        if kind in (ops.DEPTHWISE, ops.GROUPED):
            for number, group in enumerate(groups):
                if str(node.target) in group.filters:
                    kinds[number].add(kind)
        operands = [read for read in flow.read[node].values() if read is not None]
        if kind in (ops.ADD, ops.MUL) and len(operands) == 2:
            for one, other in dict.fromkeys(zip(*operands, strict=False)):
                for number in groups_of(one) & groups_of(other) if one != other else ():
                    kinds[number].add(kind)
    return [
        tuple(word for kind, word in TIES.items() if kind in found and len(group.members) > 1)
        for group, found in zip(groups, kinds, strict=True)
    ]


def _whole(
    model: nn.Module, graph: ChannelGraph, tied: Prunable, macs: Counter[str]
) -> tuple[Whole, ...]:
    """Every convolution that is in no group, those that run first and then those that do not."""
    sizes = {
        name: module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    pruned = set(tied.layers)
    called = _calls(graph)
    functions = _functions(graph)
    run_first = [*called, *functions, *sizes]
    found = []
    for name in dict.fromkeys(run_first):
        if name in pruned or (name not in sizes and name not in tied.kept_full):
            continue
        node = called.get(name) or functions.get(name)
        idle = "it takes no part when the network is evaluated"
        strange = "its weight is not used as it is: it is called as a function"
        reason = tied.kept_full.get(name, strange if node is not None else idle)
        met = _named(reason, graph)
        place_of = met if met is not None else node
        where = place(place_of, inside=met is not None) if place_of is not None else None
        filters = sizes.get(name) or graph.filters(name)
        found.append(Whole(name, filters, reason, macs[name], where))
    return tuple(found)


def _functions(graph: ChannelGraph) -> dict[str, fx.Node]:
    """Module -> the last operation within it, where it is traced and not called as a layer."""
    stacks = ((n, list(n.meta.get("nn_module_stack", {}).values())) for n in graph.kinds)
    return {stack[-1][0]: n for n, stack in stacks if stack and n.op != "call_module"}


def _named(reason: str, graph: ChannelGraph) -> fx.Node | None:
    """The operation that a reason gives as one that pruning does not understand."""
    opaque: defaultdict[str, fx.Node | None] = defaultdict(lambda: None)
    opaque.update({n.name: n for n, kind in graph.kinds.items() if kind == ops.OPAQUE})
    words = (word.strip(",:;.") for word in reason.split())
    return next((opaque[word] for word in words if opaque[word] is not None), None)
