"""Torchvision's networks, half of each layer pruned: as cut, tuned, and what is left after export.

    python scripts/bench_families.py torch
    python scripts/bench_families.py onnxruntime resnet18,mobilenet_v2

Arguments: runtime, and names with commas (without: all). One image of 96x96, BatchNorms drawn at
random. "off": largest difference of the tuned network, exported to ONNX, from the zeroed network at
full width, over the largest output.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torchvision
from torch import nn

import fpgm
from fpgm.compaction.compact import compare
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.machine.device import keep_freed_memory
from fpgm.shipping.export import export, run_exported
from fpgm.shipping.latency import measure
from fpgm.shipping.tuning import Target, tune

NAMES = (
    "resnet18", "resnet50", "vgg11_bn", "densenet121", "googlenet", "mobilenet_v2",
    "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "mnasnet0_5", "shufflenet_v2_x1_0",
    "convnext_tiny",
)  # fmt: skip
IMAGE = (3, 96, 96)


def main(runtime: str, names: tuple[str, ...]) -> None:
    keep_freed_memory()
    threads = torch.get_num_threads()
    print(f"| {runtime} | MACs as cut | speed-up | form chosen | MACs tuned | speed-up | off |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for name in names:
        torch.manual_seed(0)
        more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **more).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, std=0.3)
        groups = prunable(trace(model), "independent").groups
        keep = fpgm.select(model, "random", 0.5)
        fpgm.zero_(model, keep)
        dense = fpgm.cost(model, IMAGE).macs
        tuned = tune(model, keep, Target(runtime, IMAGE, 1, threads), groups)
        cells = []
        for ballast in ({}, tuned.ballast):
            small = fpgm.compact(model, keep, ballast)
            (row,) = measure(model, small, IMAGE, [runtime], [1], threads)
            macs = fpgm.cost(small, IMAGE).macs / dense
            cells.append(f"{100 * macs:.0f} % | {row['speed_up']:.2f}")
        images = torch.randn(16, *IMAGE)
        with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
            path = Path(directory) / "tuned.onnx"
            export(small, path, IMAGE, dynamic=True)
            found = compare(model(images), run_exported(path, images, dynamic=True))
        off = found["max_abs_diff"] / found["max_abs_logit"]
        print(f"| {name} | {cells[0]} | {tuned.form} | {cells[1]} | {off:.0e} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], tuple(sys.argv[2].split(",")) if len(sys.argv) > 2 else NAMES)
