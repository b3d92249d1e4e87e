"""What it costs to score a network by each criterion: seconds on ResNet-50, 224x224 images.

    OMP_NUM_THREADS=2 python scripts/criterion_costs.py [NAME ...] [--size 224] [--images 8]

Evidence is gathered from one batch of noise, then every layer that can be pruned is scored. Weights
are torchvision's at random, as only the time matters; one after another, each once.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.networks.modes import evaluating
from fpgm.selection.rule import Rule
from fpgm.selection.select import score


def seconds(name: str, network: torch.nn.Module, size: int, images: int) -> tuple[float, float]:
    """To gather what the criterion looks at, and to score all layers by it."""
    shape = (3, size, size)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(images, *shape, generator=generator)
    labels = torch.randint(1000, (images,), generator=generator)
    groups = prunable(trace(network, shape)).groups
    started = time.perf_counter()
    seen = None
    if CRITERIA[name].views:
        seen = fpgm.evidence.gather(network, [name], [(batch, labels)], image=shape)
    gathered = time.perf_counter()
    score(network, Rule(name), 0.5, groups, seen, shape)
    return gathered - started, time.perf_counter() - gathered


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of criteria (default: all)")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = torchvision.models.resnet50().eval()
    with evaluating(network):
        size, threads = options.size, torch.get_num_threads()
        print(f"{threads} threads, {options.images} images of {size}x{size}")
        for name in options.names or CRITERIA:
            looked, scored = seconds(name, network, size, options.images)
            print(f"{name:16} {looked:7.2f} s to look  {scored:7.2f} s to score", flush=True)


if __name__ == "__main__":
    main()
