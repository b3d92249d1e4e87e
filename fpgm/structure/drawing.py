"""The page: what was found, with the graph drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from fpgm.page import bullets, page, table, text
from fpgm.structure.diagram import svg
from fpgm.structure.parts import Structure, Whole
from fpgm.structure.text import by_reason, head, percent, together

GROUPS = (
    "A group is decided in one ranking: the channels of its layers stay or go together. MACs of "
    "one channel: what goes with it, of the filters that write it and of the layers that read it."
)
KEY = (
    "Layers in the order of execution, from top to bottom, with the share of the network's MACs. "
    "Coloured: groups of several layers, which light up together under the pointer. White: "
    "a layer that is decided by itself. Grey and dashed: kept whole. Red: what pruning does not "
    "understand. BatchNorms, activations and pooling are part of the lines."
)


def html(structure: Structure) -> str:
    """The page, with nothing from a network."""
    sections = {
        "The network": _drawing(structure),
        "What can be pruned": _groups(structure),
        "What is kept whole": _kept(structure),
        "No convolutions": _others(structure),
    }
    return page(
        f"What of {structure.name} can be pruned",
        f"{'; '.join(head(structure))}.",
        [(name, parts) for name, parts in sections.items() if parts],
    )


def _drawing(structure: Structure) -> list[Markup]:
    content = Markup('<div class="scroll">%s</div>') % svg(structure)
    caption = f"The graph of {structure.name}."
    drawing = Markup("<figure>%s<figcaption>%s</figcaption></figure>") % (content, caption)
    return [text(KEY), drawing]


def _share(structure: Structure, macs: float) -> tuple[float, str]:
    return structure.share(macs), percent(structure, macs)


def _groups(structure: Structure) -> list[Markup]:
    rows = [
        (b.number, b.channels, round(b.macs), _share(structure, b.macs), round(b.per_channel),
         together(b), ", ".join(b.layers))
        for b in structure.bundles
    ]  # fmt: skip
    header = ("group", "channels", "MACs", "share", "MACs of one channel", "together by", "layers")
    return [text(GROUPS), table(header, rows)] if rows else []


def _kept(structure: Structure) -> list[Markup]:
    if not structure.whole:
        return []
    rows = [
        (one.layer, one.filters, one.macs, _share(structure, one.macs), one.reason, _code(one))
        for one in structure.whole
    ]
    header = ("layer", "filters", "MACs", "share", "why", "where")
    return [bullets(_reasons(structure)), table(header, rows)]


def _reasons(structure: Structure) -> Iterator[str]:
    for reason, layers in by_reason(structure.whole).items():
        share = percent(structure, sum(one.macs for one in layers))
        count = f"{len(layers)} layers, " if layers[1:] else f"{layers[0].layer}, "
        yield f"{reason}: {count}{share} of the MACs"


def _code(one: Whole) -> Any:
    if one.place is None:
        return None
    return Markup("%s<br><code>%s</code>") % (str(one.place), one.place.code)


def _others(structure: Structure) -> list[Markup]:
    rows = [(name, macs, _share(structure, macs)) for name, macs in structure.others.items()]
    return [table(("layer or operation", "MACs", "share"), rows)] if rows else []
