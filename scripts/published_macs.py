"""All published reductions of MACs, by the papers' closed form and by counting whole filters.

    python scripts/published_macs.py          # Markdown, seconds, nothing is trained

"closed form" takes the rates as they are printed, fractional channels included; "compact" counts
the network that fpgm would ship for them, filters drawn at random. Published figures that neither
gives are explained below the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torchvision
from torch import nn

import fpgm
from fpgm.compaction.constants import analyse
from fpgm.graph.cost import cost, paper_reduction
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.selection.rule import Rule
from fpgm.selection.select import highest, score

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
EXPLAINED = """\
- ResNet-50, 42.2 and 53.5: with the stride of a stage in its first 1x1 convolution, as He et al.
  have it (3.86 G MACs). torchvision's has it in the 3x3 (4.09 G), which is what users prune: 41.5
  and 52.8.
- ResNet-50 of SFP, 41.8: the same network, its first block counted as if it read the whole stem.
- ResNet-18, 41.8: the same two ways of counting give 41.7 and 40.4 here; no count was found that
  gives 41.8.
- ResNet-101, 42.2: not by the authors' own formula (44.1); the 42.2 is ResNet-50's.
- ResNet-110-B, 38.6: 38.66, cut off and not rounded."""


@dataclass(frozen=True)
class Row:
    """A published reduction, in percent as printed. asked: what selection.rule.Rule is told; stem:
    whether the first block's saving from a pruned stem is counted."""

    paper: str
    network: str
    what: str
    published: str
    asked: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 0.0
    stem: bool = True


def stride_in_1x1(name: str) -> nn.Module:
    """torchvision's bottleneck ResNet with the stride where He et al. (CVPR 2016) have it."""
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    **{
        name: (lambda n=name: fpgm.model(n), CIFAR)  # type: ignore[misc]
        for name in ("resnet20", "resnet32", "resnet56", "resnet110", "vgg16")
    },
    **{
        f"ImageNet {name}": (lambda n=name: torchvision.models.get_model(n), IMAGENET)  # type: ignore[misc]
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "vgg16")
    },
    **{
        f"ImageNet {name}, stride in the 1x1": (lambda n=name: stride_in_1x1(n), IMAGENET)  # type: ignore[misc]
        for name in ("resnet50", "resnet101")
    },
}


def first_of_blocks(stages: Sequence[float], skipped: Sequence[int], blocks: int) -> dict[str, Any]:
    """PFEC's ResNets: the first convolution of each block, a rate a stage, whole counts of what is
    kept; skipped: by the number of the convolution, the stem is 1."""
    places = [number // 2 - 1 for number in skipped]
    whole = {f"layer{1 + place // blocks}.{place % blocks}.conv1": 0.0 for place in places}
    rates = {f"layer{stage}.*.conv1": rate for stage, rate in enumerate(stages, 1)}
    return {"rates": {**whole, **rates}, "rounding": "kept"}


PFEC_VGG = [32, 64, 128, 128, *[256] * 9]
CP_5X = [24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512]
THINET = [32, 32, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512]
ROWS = (
    *(
        Row("FPGM, table 1", f"resnet{depth}", f"rate {rate}", figure, rate=rate)
        for depth, rate, figure in (
            (20, 0.3, "42.2"), (20, 0.4, "54.0"), (32, 0.3, "41.5"), (32, 0.4, "53.2"),
            (56, 0.4, "52.6"), (110, 0.3, "40.8"), (110, 0.4, "52.3"),
        )
    ),
    Row("FPGM, table 2", "ImageNet resnet18", "rate 0.3", "41.8", rate=0.3),
    Row("FPGM, table 2", "ImageNet resnet34", "rate 0.3", "41.1", rate=0.3),
    Row("FPGM, table 2", "ImageNet resnet50", "rate 0.3", "42.2", rate=0.3),
    Row("FPGM, table 2", "ImageNet resnet50", "rate 0.4", "53.5", rate=0.4),
    Row("FPGM, table 2", "ImageNet resnet50, stride in the 1x1", "rate 0.3", "42.2", rate=0.3),
    Row("FPGM, table 2", "ImageNet resnet50, stride in the 1x1", "rate 0.4", "53.5", rate=0.4),
    Row("SFP", "ImageNet resnet50, stride in the 1x1", "rate 0.3, stem whole to its readers",
        "41.8", rate=0.3, stem=False),
    Row("FPGM, table 2", "ImageNet resnet101, stride in the 1x1", "rate 0.3", "42.2", rate=0.3),
    Row("PFEC, FPGM table 4", "vgg16", "widths of VGG-16-A", "34.2", {"widths": PFEC_VGG}),
    Row("FPGM, table 4", "vgg16", "rate 0.2", "35.9", rate=0.2),
    Row("PFEC", "resnet56", "A: 10 % each", "10.4",
        first_of_blocks((0.1, 0.1, 0.1), (16, 20, 38, 54), 9)),
    Row("PFEC", "resnet56", "B: 60, 30, 10 %", "27.6",
        first_of_blocks((0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54), 9)),
    Row("PFEC", "resnet110", "A: 50, 0, 0 %", "15.9", first_of_blocks((0.5, 0.0, 0.0), (36,), 18)),
    Row("PFEC", "resnet110", "B: 50, 40, 30 %", "38.6",
        first_of_blocks((0.5, 0.4, 0.3), (36, 38, 74), 18)),
    Row("CP, 5x", "ImageNet vgg16", "its widths", "", {"widths": CP_5X}),
    Row("ThiNet", "ImageNet vgg16", "its widths", "", {"widths": THINET}),
)  # fmt: skip


def reductions(row: Row) -> tuple[float, float]:
    """Percent of the convolutions' MACs that go: by the closed form, and of the compact network
    with whole filters drawn at random."""
    build, image = NETWORKS[row.network]
    model = build()
    graph, dense = trace(model), cost(model, image)
    tied = prunable(graph)
    sizes = {name: graph.filters(name) for name in tied.layers}
    rule = Rule("random", **row.asked).for_network(sizes, tied.kept_full)
    keep = highest(score(model, rule, row.rate, tied.groups), rule, row.rate, tied.groups)
    layers = {layer.name: layer.macs for layer in dense.layers}
    if row.asked:  # counts are whole there
        rates = {name: 1 - len(kept) / sizes[name] for name, kept in keep.items()}
    else:
        rates = dict.fromkeys(tied.layers, row.rate)
    formula = paper_reduction(graph, layers, rates)
    assert formula is not None
    total = sum(layers[name] for _, name in graph.convolutions())
    if not row.stem:
        stem = next(name for _, name in graph.convolutions())
        whole = paper_reduction(graph, layers, {**rates, stem: 0.0})
        assert whole is not None
        formula = whole + 100 * rates[stem] * layers[stem] / total
    saved = dense.macs - analyse(graph, keep).macs(dense)
    linear = sum(layers.values()) - total
    # Convolutions alone, as the papers count: what the classifier saves is not theirs.
    kept_linear = 0
    for node, kind in graph.kinds.items():
        if kind == "linear":
            inputs = analyse(graph, keep).inputs(node)
            kept_linear += layers[str(node.target)] * len(inputs.live) // inputs.total
    return formula, 100 * (saved - (linear - kept_linear)) / total


def table(rows: Sequence[Row] = ROWS) -> Iterator[str]:
    """The lines of the Markdown table."""
    yield "| from | network | asked | published | closed form | compact, convolutions |"
    yield "|---|---|---|---:|---:|---:|"
    for row in rows:
        formula, compact = reductions(row)
        printed = f"-{row.published}" if row.published else "widths only"
        yield (
            f"| {row.paper} | {row.network} | {row.what} | {printed} | -{formula:.2f} "
            f"| -{compact:.2f} |"
        )


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
    print(f"\n{EXPLAINED}")
