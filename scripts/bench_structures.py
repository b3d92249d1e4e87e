"""What a structure is worth in milliseconds: residual modes, alignments and tuning of one network.

    python scripts/bench_structures.py resnet56 32 128
    python scripts/bench_structures.py resnet18 224 1

Arguments: network, image size, batch, and `zero` for constants that are all zero, as within the
groups of a run from scratch; else BatchNorms are drawn at random, so that pruned filters leave
constants as those of a pretrained network do. The filters are chosen on the random start: time
depends on the structure, not on the weights. Dense and compact run in turn, medians.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn

import fpgm
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.machine.device import keep_freed_memory
from fpgm.selection.budget import rate_under
from fpgm.shipping.latency import measure
from fpgm.shipping.runtimes import RUNTIMES
from fpgm.shipping.tuning import Target, tune

# residual, align, and either the share of the MACs or the rate; tuned as well?
SETTINGS = {
    "resnet56": [
        ("independent", 1, 0.5, None, True),
        ("inner", 8, 0.51, None, False),
        ("shared", 8, 0.5, None, False),
        ("shared", 16, 0.51, None, False),
    ],
    "resnet18": [
        ("independent", 1, 0.5, None, True),
        ("inner", 16, None, 0.5, False),
        ("shared", 16, None, 0.5, False),
    ],
}


def main(arch: str, size: int, batch: int, constants: str = "random") -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    model = fpgm.model(arch, num_classes=1000 if size > 64 else 10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and constants != "zero":
            nn.init.normal_(module.bias)
    image, threads = (3, size, size), torch.get_num_threads()
    dense = fpgm.cost(model, image).macs

    def row(name: str, networks: Sequence[nn.Module]) -> None:
        ratios = sorted(dense / fpgm.cost(network, image).macs for network in networks)
        span = " to ".join(dict.fromkeys(f"{r:.2f}" for r in (ratios[0], ratios[-1])))
        cells = []
        for runtime, network in zip(RUNTIMES, networks, strict=True):
            (found,) = measure(model, network, image, [runtime], [batch], threads)
            cells.append(f"{found['speed_up']:.2f}")
        print(f"| {name} | {span} |", " | ".join(cells), "|", flush=True)

    print(f"| {arch} at {size}, batch {batch} | MACs ratio |", " | ".join(RUNTIMES), "|")
    print("|---|---:" + "|---:" * len(RUNTIMES) + "|")
    for residual, align, share, rate, tuned in SETTINGS[arch]:
        groups = prunable(trace(model), residual).groups

        def keep_at(rate: float, residual=residual, align=align) -> dict[str, torch.Tensor]:
            return fpgm.select(model, "gm", rate, residual=residual, align=align)

        def macs(rate: float, keep_at=keep_at) -> int:
            return fpgm.cost(fpgm.compact(model, keep_at(rate)), image).macs

        keep = keep_at(rate_under(share * dense, macs) if share else rate)
        name = f"{residual}, align {align}"
        row(name, [fpgm.compact(model, keep)] * len(RUNTIMES))
        if not tuned or constants == "zero":
            continue
        targets = [Target(runtime, image, batch, threads) for runtime in RUNTIMES]
        forms = [tune(model, keep, target, groups).ballast for target in targets]
        row(f"{name}, tuned for each", [fpgm.compact(model, keep, ballast) for ballast in forms])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
