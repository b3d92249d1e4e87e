"""What was found as text: a head, a table of groups, and what stays whole by reason."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from fpgm.structure.parts import Bundle, Structure, Whole

SHOWN = 3  # layers of a list, where not all are wanted
CODE = 60  # characters of a line of code


def text(structure: Structure, every: bool = False) -> str:
    """All of it. every: name each layer, however many a list has."""
    lines = [*head(structure), ""]
    if structure.bundles:
        lines += [*_table(structure, every), ""]
    if structure.whole:
        lines += [*_kept(structure, every), ""]
    if structure.others:
        macs = sum(structure.others.values())
        names = listed(list(structure.others), every)
        lines.append(f"no convolution: {percent(structure, macs)} of the MACs, {names}")
    return "\n".join(lines).rstrip()


def head(structure: Structure) -> list[str]:
    """The network, and how much of it can be pruned: a line each."""
    dense, after = structure.dense, structure.after
    images = "x".join(map(str, structure.image))
    lines = [
        f"{structure.name} on images of {images}: {dense.macs:,} MACs, {dense.params:,} parameters",
    ]
    count = len(structure.bundles)
    if count == 0:
        return [*lines, "nothing can be pruned"]
    lines.append(
        f"{percent(structure, structure.prunable)} of the MACs are of filters that can be pruned, "
        f"in {count} group{'s' if count > 1 else ''} (residual={structure.residual})"
    )
    if after is not None:
        lines.append(
            f"rate={structure.rate:g} leaves {after.macs:,} MACs "
            f"({percent(structure, after.macs)}) and {after.params:,} parameters"
        )
    return lines


def percent(structure: Structure, macs: float) -> str:
    """Of the network's MACs. A little never reads as nothing, nor nearly all as all."""
    share = structure.share(macs)
    if 0 < share < 0.05:
        return "below 0.1 %"
    return "above 99.9 %" if share >= 99.95 and macs < structure.dense.macs else f"{share:.1f} %"


def as_json(structure: Structure) -> str:
    """All of it, shares in percent of the MACs."""
    dense, after = structure.dense, structure.after
    content = {
        "model": structure.name,
        "image": structure.image,
        "residual": structure.residual,
        "macs": dense.macs,
        "params": dense.params,
        "prunable_share": structure.share(structure.prunable),
        "rate": structure.rate,
        "after": after and {"macs": after.macs, "params": after.params},
        "groups": [{**asdict(b), "share": structure.share(b.macs)} for b in structure.bundles],
        "kept_whole": [{**asdict(w), "share": structure.share(w.macs)} for w in structure.whole],
        "others": structure.others,
    }
    return json.dumps(content, indent=2)


def together(bundle: Bundle) -> str:
    """Why a group's layers are decided as one."""
    if len(bundle.layers) == 1:
        return "one layer"
    return ", ".join(bundle.ties) or "tied"


def listed(names: Sequence[str], every: bool) -> str:
    """Names, of many the first ones."""
    if every or len(names) <= SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[: SHOWN - 1])} and {len(names) - SHOWN + 1} more"


def by_reason(whole: Sequence[Whole]) -> dict[str, list[Whole]]:
    """What stays whole by reason, whichever of the operations of one name it is."""
    found: defaultdict[str, list[Whole]] = defaultdict(list)
    for one in whole:
        found[re.sub(r"(?<=into )(\D\w*?)_\d+\b", r"\1", one.reason)].append(one)
    return dict(found)


def _table(structure: Structure, every: bool) -> Iterator[str]:
    rows = [("group", "channels", "MACs", "share", "together by", "layers")]
    rows += [
        (str(b.number), str(b.channels), f"{b.macs:,.0f}", percent(structure, b.macs), together(b),
         listed(b.layers, every))
        for b in structure.bundles
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[:4], widths, strict=False))
        yield "  ".join([*numbers, row[4].ljust(widths[4]), row[5]])


def _kept(structure: Structure, every: bool) -> Iterator[str]:
    macs = sum(one.macs for one in structure.whole)
    yield f"kept whole: {percent(structure, macs)} of the MACs"
    for reason, layers in by_reason(structure.whole).items():
        total = percent(structure, sum(one.macs for one in layers))
        count = f"{len(layers)} layers, " if len(layers) > 1 else ""
        yield f"  {reason}: {count}{total}"
        places = {str(one.place): one.place for one in layers}
        (first, *others) = places.values()
        if not others:  # one line is why
            if first is not None:
                yield f"    {first}  {first.code[:CODE]}"
            yield f"    {listed([one.layer for one in layers], every)}"
            continue
        shown = layers if every or len(layers) <= SHOWN else layers[: SHOWN - 1]
        width = max(len(one.layer) for one in shown)
        for one in shown:
            where = f"{one.place}  {one.place.code[:CODE]}" if one.place else ""
            yield f"    {one.layer.ljust(width)}  {where}".rstrip()
        if len(shown) < len(layers):
            yield f"    and {len(layers) - len(shown)} more"
