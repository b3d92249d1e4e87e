"""fpgm beside Torch-Pruning at equal MACs: time to prune and compact, MACs reached, milliseconds.

    pip install '.[dev]'
    python scripts/compare_torch_pruning.py resnet56 32 128
    python scripts/compare_torch_pruning.py resnet56b 32 128
    python scripts/compare_torch_pruning.py resnet18 224 1

Arguments: network (resnet56b: with projections in place of shortcuts A, which the other tool cannot
prune), image size, batch. BatchNorms are drawn at random, so that constants are there;
both tools choose by geometric median, one decision for each residual stream, at the rate that comes
nearest to half of the MACs from below. Torch-Pruning drops the constants, fpgm carries them.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence

import torch
import torch_pruning
from torch import nn

import fpgm
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.machine.device import keep_freed_memory
from fpgm.shipping.latency import measure
from fpgm.shipping.runtimes import RUNTIMES
from fpgm.shipping.tuning import Target, tune

SHARE = 0.51  # of the dense MACs: widths of 16 make coarse steps
ALIGN = 16
RATES = [percent / 100 for percent in range(30, 80)]


def with_constants(arch: str, size: int) -> nn.Module:
    """A network at its random start, its BatchNorms' shifts drawn at random."""
    torch.manual_seed(0)
    model = fpgm.model(arch.removesuffix("b"), num_classes=1000 if size > 64 else 10).eval()
    for name in ("layer2", "layer3") if arch.endswith("b") else ():
        group = model.get_submodule(name)[0]
        inputs, outputs = group.conv1.in_channels, group.conv1.out_channels
        projection = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
        group.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs).eval())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    return model


def by_fpgm(model: nn.Module, rate: float, align: int, size: int) -> nn.Module:
    keep = fpgm.select(model, "gm", rate, residual="shared", align=align)
    return fpgm.compact(model, keep)


def tuned(model: nn.Module, rate: float, align: int, size: int, runtime: str, batch: int):
    """fpgm's network in the form that is fastest on a runtime."""
    keep = fpgm.select(model, "gm", rate, residual="shared", align=align)
    target = Target(runtime, (3, size, size), batch, torch.get_num_threads())
    return fpgm.compact(
        model, keep, tune(model, keep, target, prunable(trace(model), "shared").groups).ballast
    )


def by_torch_pruning(model: nn.Module, rate: float, align: int, size: int) -> nn.Module:
    model = copy.deepcopy(model)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, torch.zeros(1, 3, size, size), torch_pruning.importance.FPGMImportance(),
        pruning_ratio=rate, ignored_layers=last, round_to=align if align > 1 else None,
    )  # fmt: skip
    pruner.step()
    return model


def main(arch: str, size: int, batch: int) -> None:
    keep_freed_memory()
    model, image = with_constants(arch, size), (3, size, size)
    dense, threads = fpgm.cost(model, image).macs, torch.get_num_threads()
    print(
        f"| {arch} | align | time to prune and compact, s | MACs ratio |", *RUNTIMES, "", sep=" | "
    )
    print("|---|---:|---:|---:" + "|---:" * len(RUNTIMES) + "|")

    def row(name: str, align: int, seconds: float, networks: Sequence[nn.Module]) -> None:
        ratios = sorted({f"{dense / fpgm.cost(network, image).macs:.2f}" for network in networks})
        cells = []
        for runtime, network in zip(RUNTIMES, networks, strict=True):
            (found,) = measure(model, network, image, [runtime], [batch], threads)
            cells.append(f"{found['speed_up']:.2f}")
        ratio = " to ".join(dict.fromkeys((ratios[0], ratios[-1])))
        print(f"| {name} | {align} | {seconds:.2f} | {ratio} |", *cells, "", sep=" | ", flush=True)

    for align in (1, ALIGN):
        for name, prune in {"fpgm": by_fpgm, "Torch-Pruning": by_torch_pruning}.items():
            try:
                costs = ((r, fpgm.cost(prune(model, r, align, size), image).macs) for r in RATES)
                rate = next(r for r, macs in costs if macs <= SHARE * dense)
            except Exception as error:  # the other tool's failures are results, too
                print(f"| {name} | {align} | {type(error).__name__}: {str(error)[:150]} |")
                continue
            began = time.perf_counter()
            small = prune(model, rate, align, size)
            row(name, align, time.perf_counter() - began, [small] * len(RUNTIMES))
            if name == "fpgm" and align == 1:
                began = time.perf_counter()
                forms = [tuned(model, rate, align, size, runtime, batch) for runtime in RUNTIMES]
                row("fpgm, tuned for each", align, time.perf_counter() - began, forms)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
