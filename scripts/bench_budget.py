"""Does latency_target end where it is asked to? Half of dense's time, in each runtime.

    python scripts/bench_budget.py resnet56 32 128     # network, pixels, batch; minutes
    python scripts/bench_budget.py mobilenet_v2 224 1 onnxruntime,openvino 8 0.5
    python scripts/bench_budget.py resnet20 32 128 onnxruntime,onnxruntime_int8 8 0.6 silent

Fresh weights, BatchNorm shifts drawn at random, so that what pruned filters leave is there (silent:
not, as of schedule=fade); widths in multiples of 16 (or as given), streams shared. Prints rows of
Markdown; the last column has the share of the same network in the others of the runtimes.
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
from fpgm.pruning.latency import Latency, find, with_constants
from fpgm.selection.ranking import group_scores
from fpgm.selection.rule import Rule
from fpgm.selection.select import score
from fpgm.shipping.runtimes import Target
from fpgm.shipping.widths import both_apart, counts, highest, silenced


def main(
    name: str,
    pixels: str,
    batch: str,
    runtimes: str = "torch,onnxruntime,openvino",
    align: str = "16",
    share: str = "0.5",
    silent: str = "",
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
            found = find(model, groups, by_group, latency, int(align), 0.1, print, bool(silent))
        seconds = time.perf_counter() - began
        keep = highest(groups, by_group, found.groups)
        twin = with_constants(model)
        twin = silenced(twin, keep, image) if silent else twin
        small = fpgm.cost(fpgm.compact(twin, keep), image).macs
        elsewhere = []
        for other in runtimes.split(","):
            full, now = both_apart(twin, keep, {}, Target(other, image, int(batch), target.threads))
            elsewhere.append(f"{other} {now / full:.3f} ({now:.2f} of {full:.2f} ms)")
        kept = counts(groups, found.groups)
        narrow = sum(kept.values()) / sum(graph.filters(layer) for layer in kept)
        first = found.rounds[0]["predicted_ms"] / found.rounds[0]["measured_ms"]
        print(
            f"| {name}, batch {batch} | {runtime} | {found.dense:.2f} | {found.predicted:.2f} | "
            f"{found.measured:.2f} | {found.share:.3f} | {first:.2f} | {len(found.rounds)} | "
            f"{narrow:.2f} of the filters, {small / dense:.2f} of the MACs | {seconds:.0f} s |",
            "; ".join(elsewhere),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
