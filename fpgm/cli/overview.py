"""`fpgm`: which commands there are."""

from __future__ import annotations

import argparse
from importlib.metadata import version

COMMANDS = """\
fpgm-train        train a CNN while pruning its filters, and write the smaller network
fpgm-evaluate     accuracy, MACs, parameters and bytes of a run's networks, on any images
fpgm-report       compare finished runs, with each other and with the papers
fpgm-study        look at what a criterion sees in a network
fpgm-figure       the papers' figures of a network: norms, and which feature maps are replaceable
fpgm-sensitivity  what each layer alone can lose, and rates by layer that follow from it
fpgm-explain      what of a network can be pruned, and why the rest cannot, with the line of code
fpgm-compress     two convolutions of low rank in place of one, in a network that is pruned
fpgm-export       the smaller network as ONNX or as torch.export's .pt2
fpgm-latency      time the network before and after, by runtime"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm."""
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fpgm", description=COMMANDS, formatter_class=lines)
    parser.add_argument("--version", action="version", version=f"fpgm {version('fpgm')}")
    parser.parse_args(argv)
    print(COMMANDS)
