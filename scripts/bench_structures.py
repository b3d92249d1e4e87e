"""What a structure is worth in milliseconds: residual modes and alignments of one network.

    python scripts/bench_structures.py resnet56 32 128
    python scripts/bench_structures.py resnet18 224 1

Arguments: network, image size, batch. The filters are chosen on the random start: time depends on
the structure, not on the weights.
"""

import sys

import torch

import fpgm
from fpgm.budget import rate_under
from fpgm.coupling import couple
from fpgm.graph import trace
from fpgm.latency import RUNTIMES, measure

SETTINGS = {
    "resnet56": [
        ("independent", 1, 0.5),
        ("inner", 8, 0.51),
        ("shared", 1, 0.5),
        ("shared", 8, 0.5),
    ],
    "resnet18": [("independent", 1, 0.5), ("inner", 16, 0.54), ("shared", 16, 0.5)],
}


def main(arch: str, size: int, batch: int) -> None:
    torch.manual_seed(0)
    model = fpgm.model(arch, num_classes=1000 if size > 64 else 10).eval()
    image = (3, size, size)
    dense = fpgm.cost(model, image).macs
    print("| residual | align | MACs ratio | " + " | ".join(RUNTIMES) + " |")
    print("|---|---:|---:|" + "---:|" * len(RUNTIMES))
    for residual, align, target in SETTINGS[arch]:
        blocks = couple(trace(model), residual).blocks

        def compacted(rate: float, blocks=blocks, align=align) -> torch.nn.Module:
            keep = fpgm.select(model, "gm", rate, align=align, blocks=blocks)
            return fpgm.compact(model, keep)

        def macs(rate: float, compacted=compacted) -> int:
            return fpgm.cost(compacted(rate), image).macs

        small = compacted(rate_under(target * dense, macs))
        ratio = dense / fpgm.cost(small, image).macs
        rows = measure(model, small, image, RUNTIMES, [batch], torch.get_num_threads())
        cells = " | ".join(f"{row['speed_up']:.2f}" for row in rows)
        print(f"| {residual} | {align} | {ratio:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
