"""What the experiments cost, written into the heads of configs/experiment/*.yaml.

    python scripts/experiment_costs.py

Forward and backward take three times the MACs of a forward pass. Hours on a CPU are computed from
816 images a second of ResNet-20 (measured on 2 cores, docs/performance.md), at the same MACs a
second for the other networks; hours on a GPU from 3.3e12 MACs a second, an assumption (5 % of what
an A100 does in bf16 at its peak): no figure of a GPU is measured yet.
"""

from __future__ import annotations

import re
from pathlib import Path

import hydra
import yaml
from omegaconf import OmegaConf

import fpgm
from fpgm.keys import CONFIGS
from fpgm.runs.grid import runs

IMAGES = {  # how many, how large, of how many classes
    "cifar10": (50_000, 32, 10), "digits": (1437, 8, 10), "imagenet": (1_281_167, 224, 1000),
    "mnist": (60_000, 28, 10),
}  # fmt: skip
CPU = 816 * 40_551_040  # MACs of forward passes a second
GPU = 3.3e12 / 3
START = 7  # seconds of a run beside its epochs: imports, tracing, the proof (dataset=digits)


def cost(path: Path) -> str:
    sweeper = yaml.safe_load(path.read_text()).get("hydra", {}).get("sweeper", {"rows": [{}]})
    seeds = len(sweeper.get("params", {}).get("seed", "0").split(","))
    macs = images = 0
    jobs = runs(sweeper["rows"])
    for job in jobs:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            words = [w for w in job if not w.startswith("pretrained=baseline")]
            config = OmegaConf.create(
                hydra.compose("config", overrides=[f"experiment={path.stem}", *words])
            )
        count, size, classes = IMAGES[config.dataset.name]
        passed = count * (1 - config.dataset.validation) * config.epochs * seeds
        network = fpgm.model(config.arch, num_classes=classes)
        macs += passed * fpgm.cost(network, (3, size, size)).macs
        images += passed
    count = len(jobs) * seeds
    on_cpu, on_gpu = (_time(macs / speed + START * count) for speed in (CPU, GPU))
    return (
        f"{count} run{'s' * (count > 1)}, {images / 1e6:,.3g} million training images; computed: "
        f"{on_cpu} on 2 CPU cores, {on_gpu} on a GPU"
    )


def _time(seconds: float) -> str:
    """To two digits, in hours from half of one on."""
    hours, minutes = float(f"{seconds / 3600:.2g}"), float(f"{seconds / 60:.2g}")
    return f"{hours:,g} hours" if seconds > 1800 else f"{minutes:,g} minutes"


if __name__ == "__main__":
    for file in sorted((CONFIGS / "experiment").glob("*.yaml")):
        line = cost(file)
        text = file.read_text()
        file.write_text(re.sub("(?m)^# Cost: .*", f"# Cost: {line}", text))
        print(f"{file.stem}: {line}", flush=True)
