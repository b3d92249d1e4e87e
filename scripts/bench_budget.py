"""Does latency_target end where it is asked to? Half of dense's time, in each runtime.

    python scripts/bench_budget.py resnet56 32 128     # network, pixels, batch; minutes
    python scripts/bench_budget.py mobilenet_v2 224 1 onnxruntime,openvino 8 0.5

Fresh weights, BatchNorm shifts drawn at random, so that what pruned filters leave is there; widths
in multiples of 16 (or as given), streams shared. Prints rows of Markdown.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import fpgm
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.machine.device import keep_freed_memory
from fpgm.networks.models import MODELS
from fpgm.pruning.latency import Latency, find
from fpgm.selection.ranking import group_scores
from fpgm.selection.rule import Rule
from fpgm.selection.select import score
from fpgm.shipping.runtimes import Target
from fpgm.shipping.widths import counts


def main(
    name: str,
    pixels: str,
    batch: str,
    runtimes: str = "torch,onnxruntime,openvino",
    align: str = "16",
    share: str = "0.5",
) -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    image = (3, int(pixels), int(pixels))
    known = name in MODELS
    model = fpgm.model(name) if known else torchvision.models.get_model(name, weights=None)
    graph = trace(model)
    groups = prunable(graph, "shared").groups
    scores = score(model, Rule("gm"), 0.0, groups)
    by_group = [group_scores(group, scores) for group in groups]
    dense = fpgm.cost(model, image).macs
    for runtime in runtimes.split(","):
        began = time.perf_counter()
        target = Target(runtime, image, int(batch), torch.get_num_threads())
        with tempfile.TemporaryDirectory() as directory:
            latency = Latency(float(share), target, Path(directory))
            found = find(model, groups, by_group, latency, int(align), 0.1, print)
        seconds = time.perf_counter() - began
        kept = counts(groups, found.groups)
        narrow = sum(kept.values()) / sum(graph.filters(layer) for layer in kept)
        first = found.rounds[0]["predicted_ms"] / found.rounds[0]["measured_ms"]
        print(
            f"| {name}, batch {batch} | {runtime} | {found.dense:.2f} | {found.predicted:.2f} | "
            f"{found.measured:.2f} | {found.share:.3f} | {first:.2f} | {len(found.rounds)} | "
            f"{narrow:.2f} of the filters, dense {dense:,} MACs | {seconds:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
