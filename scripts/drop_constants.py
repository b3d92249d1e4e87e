"""What the constants of zeroed filters are worth: a run's compact network without them.

python scripts/drop_constants.py RUN
"""

import sys
from pathlib import Path

import torch

import fpgm
from fpgm.data import sets
from fpgm.networks.layers import BorderConv2d, Expand
from fpgm.runs.run import read_config
from fpgm.training.evaluate import accuracy, logits


def main(run: Path) -> None:
    images = sets.load(torch.device("cpu"), **read_config(run)["dataset"])
    network = fpgm.load(run)
    print(f"compact: {accuracy(*logits(network, images)):.2f} %")
    for module in network.modules():
        if isinstance(module, BorderConv2d):
            module.border = None
        elif isinstance(module, Expand):
            module.constant = None
    print(f"constants dropped: {accuracy(*logits(network, images)):.2f} %")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
