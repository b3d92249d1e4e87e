"""The graph of a network as it is drawn: layers, and what joins or stops channels, as SVG.

BatchNorms, activations, pooling and the like stand for no box: they are part of the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from torch import fx

from fpgm.graph import operations as ops
from fpgm.graph.trace import ChannelGraph
from fpgm.page import COLOURS
from fpgm.structure.layout import Box, arranged
from fpgm.structure.parts import Bundle, Structure, Whole
from fpgm.structure.places import Place, place
from fpgm.structure.text import percent, together

_PASSED = (ops.NORM, ops.POOL, ops.ELEMENTWISE, ops.FLATTEN, ops.SLICE, ops.PAD)
_SIGNS = {ops.ADD: "+", ops.MUL: "\u00d7", ops.CAT: "concat", ops.OUTPUT: "output"}
LAYER = (190.0, 38.0)  # pixels
LETTERS = 29  # of a name
HUES = COLOURS[:6]  # for groups of several layers
STYLE = """\
.box rect { stroke-width: 1.5; } .box text { font: 11px system-ui, sans-serif; fill: #1c2026;
  text-anchor: middle; } .box .small { font-size: 10px; fill: #5b6470; }
.alone rect { fill: #fff; stroke: #8b95a1; } .whole rect { fill: #ececec; stroke: #5b6470;
  stroke-dasharray: 5 3; } .other rect { fill: #fff; stroke: #d5d8dd; }
.join rect { fill: #f4f5f7; stroke: #d5d8dd; } .stop rect { fill: #fde7e4; stroke: #b3261e; }
.line { fill: none; stroke: #a3abb5; stroke-width: 1.4; }
"""


@dataclass(frozen=True)
class Part:
    """A box to be drawn. lines: its text; look: classes of STYLE; hue: of a group of several
    layers; details: what a pointer on it shows."""

    lines: tuple[str, ...]
    look: str
    details: tuple[str, ...]
    hue: str | None = None

    @property
    def size(self) -> tuple[float, float]:
        """(width, height) in pixels."""
        if len(self.lines) == 2:
            return LAYER
        return max(28.0, 16 + 6.2 * len(self.lines[0])), 22.0


def drawn(graph: ChannelGraph) -> tuple[list[list[fx.Node]], list[tuple[int, int]]]:
    """What stands for a box, as nodes that are one chain, and the lines between them."""
    above: dict[fx.Node, tuple[fx.Node, ...]] = {}  # a node's boxes: itself, or those it passes on
    inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
    sizes: set[fx.Node] = set()
    for node, kind in graph.kinds.items():
        read = dict.fromkeys(n for i in node.all_input_nodes if i not in sizes for n in above[i])
        if _is_size(node, graph, sizes) or node.op == "get_attr":
            sizes.add(node)
            above[node] = ()
        elif kind in _PASSED:
            above[node] = tuple(read)
        else:
            above[node], inputs[node] = (node,), tuple(read)
    readers: dict[fx.Node, int] = dict.fromkeys(inputs, 0)
    for read_by in inputs.values():
        for node in read_by:
            readers[node] += 1
    boxes: list[list[fx.Node]] = []
    number: dict[fx.Node, int] = {}
    for node, read_by in inputs.items():
        before = read_by[0] if len(read_by) == 1 else None
        if (
            before is not None
            and readers[before] == 1
            and _stops(node, graph)
            and _stops(before, graph)
        ):
            number[node] = number[before]
            boxes[number[node]].append(node)
        else:
            number[node] = len(boxes)
            boxes.append([node])
    edges = {(number[i], number[n]) for n, read_by in inputs.items() for i in read_by}
    return boxes, sorted((a, b) for a, b in edges if a != b)


def _is_size(node: fx.Node, graph: ChannelGraph, sizes: set[fx.Node]) -> bool:
    """Whether the result is a number of pixels, images or channels, or made of such."""
    if node.op in ("placeholder", "output", "get_attr", "call_module"):
        return False
    asks = node.target == "size" or (node.target is getattr and node.args[1] == "shape")
    inputs = node.all_input_nodes
    made = bool(inputs) and sizes.issuperset(inputs)
    return bool(asks or made or ops.reads_no_channels(node, graph.flat))


def _stops(node: fx.Node, graph: ChannelGraph) -> bool:
    """Whether it is an operation that pruning does not follow, and no layer with weights."""
    module = graph.called(node)
    weights = module is not None and any(p.ndim > 1 for p in module.parameters())
    return graph.kinds[node] == ops.OPAQUE and node.op != "placeholder" and not weights


def svg(structure: Structure) -> Markup:
    """The drawing, in its own size."""
    graph = structure.graph
    boxes, edges = drawn(graph)
    parts = [_part(nodes, structure) for nodes in boxes]
    layout = arranged([part.size for part in parts], edges)
    content = [_line(upper, lower) for upper, lower in layout.lines]
    content += [_line(box, box) for box in layout.passed]
    content += [_box(part, box) for part, box in zip(parts, layout.boxes, strict=True)]
    width, height = layout.width + 4, layout.height
    # All of a group are shown when one of it is pointed at.
    marks = "".join(
        f"svg:has(.g{b.number}:hover) .g{b.number} rect {{ stroke-width: 4; }}\n"
        for b in structure.bundles
        if b.layers[1:]
    )
    return Markup(
        '<svg role="img" xmlns="http://www.w3.org/2000/svg" viewBox="-2 0 %.0f %.0f" '
        'style="width:%.0fpx;height:%.0fpx;max-width:none"><style>%s</style>%s</svg>'
    ) % (width, height, width, height, Markup(STYLE + marks), Markup("\n").join(content))


def _part(nodes: list[fx.Node], structure: Structure) -> Part:
    node, graph = nodes[0], structure.graph
    kind = graph.kinds[node]
    name = str(node.target)
    bundles = [b for b in structure.bundles if name in b.layers]
    whole = next((w for w in structure.whole if w.layer == name), None)
    if node.op == "call_module" and (bundles or whole):
        return _layer(node, bundles, whole, structure)
    if node.op == "call_module" and name in structure.others:
        share = percent(structure, structure.others[name])
        return Part((_short(name), f"no convolution · {share}"), "other", (name, *_where(node)))
    if node.op == "placeholder":
        return Part((f"{node.name}: {'x'.join(map(str, structure.image))}",), "join", ())
    if kind in _SIGNS:
        return Part((_SIGNS[kind],), "join", (node.name, *_where(node)))
    words = list(dict.fromkeys(_operation(n, graph) for n in nodes))
    told = ", ".join(words[:3]) + (", ..." if words[3:] else "")
    details = (
        "pruning does not understand this",
        *(f"{n.name} {w}" for n in nodes for w in _where(n)),
    )
    return Part((told,), "stop", details)


def _layer(
    node: fx.Node, bundles: Sequence[Bundle], whole: Whole | None, structure: Structure
) -> Part:
    name = str(node.target)
    filters = structure.graph.filters(name)
    macs = sum(layer.macs for layer in structure.dense.layers if layer.name == name)
    share = percent(structure, macs)
    cost = f"{filters} filters, {macs:,} MACs ({share})"
    if not bundles:
        assert whole is not None
        told = (name, cost, f"kept whole: {whole.reason}", *_told(whole.place))
        return Part((_short(name), f"whole · {filters} filters · {share}"), "whole", told)
    groups = (f"group {b.number}, {b.channels} channels: {together(b)}" for b in bundles)
    several = [b for b in structure.bundles if b.layers[1:]]
    hue = HUES[several.index(bundles[0]) % len(HUES)] if bundles[0] in several else None
    numbers = ", ".join(str(b.number) for b in bundles)
    text = f"group{'s' if bundles[1:] else ''} {numbers} · {filters} filters · {share}"
    look = " ".join(f"g{b.number}" for b in bundles) if hue else "alone"
    return Part((_short(name), text), look, (name, cost, *groups, *_where(node)), hue)


def _operation(node: fx.Node, graph: ChannelGraph) -> str:
    """As the network's author would call it."""
    module, target = graph.called(node), node.target
    if module is not None:
        return type(module).__name__
    return target if isinstance(target, str) else getattr(target, "__name__", node.name)


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"


def _where(node: fx.Node) -> Iterator[str]:
    yield from _told(place(node))


def _told(where: Place | None) -> Iterator[str]:
    if where is not None:
        yield f"{where}  {where.code}"


def _line(upper: Box, lower: Box) -> Markup:
    """From the bottom of one to the top of the other; within one, through it."""
    if upper is lower:
        start, end = upper.y - upper.height / 2, upper.y + upper.height / 2
        return Markup('<path class="line" d="M%.1f %.1fV%.1f"/>') % (upper.x, start, end)
    start, end = upper.y + upper.height / 2, lower.y - lower.height / 2
    middle = (start + end) / 2
    return Markup('<path class="line" d="M%.1f %.1fC%.1f %.1f %.1f %.1f %.1f %.1f"/>') % (
        upper.x, start, upper.x, middle, lower.x, middle, lower.x, end,
    )  # fmt: skip


def _box(part: Part, box: Box) -> Markup:
    hue = f' style="fill:{part.hue}2e;stroke:{part.hue}"' if part.hue else ""
    left, top = box.x - box.width / 2, box.y - box.height / 2
    rect = Markup('<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="%d"%s/>') % (
        left, top, box.width, box.height, 5 if len(part.lines) == 2 else 11, Markup(hue),
    )  # fmt: skip
    first = box.y + (-3 if len(part.lines) == 2 else 4)
    texts = [Markup('<text x="%.1f" y="%.1f">%s</text>') % (box.x, first, part.lines[0])]
    for words in part.lines[1:]:
        texts.append(
            Markup('<text class="small" x="%.1f" y="%.1f">%s</text>') % (box.x, first + 14, words)
        )
    title = Markup("<title>%s</title>") % "\n".join(part.details)
    return Markup('<g class="box %s">%s%s%s</g>') % (part.look, title, rect, Markup("").join(texts))
