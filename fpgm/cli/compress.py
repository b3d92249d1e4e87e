"""`fpgm-compress`: what pruning has left, with two convolutions of low rank in place of one.

Writes a network that `fpgm-train arch=compact pretrained=DIR` trains on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from fpgm.cli.explain import explain
from fpgm.compaction.compact import load
from fpgm.compression import low_rank, ranks
from fpgm.data.images import Images
from fpgm.errors import BudgetError, Error
from fpgm.graph.cost import cost
from fpgm.machine.device import choose_device, environment
from fpgm.networks.layers import WAYS, ZHANG
from fpgm.runs import checkpoint
from fpgm.runs.files import write_text
from fpgm.runs.run import LOW_RANK, read_config
from fpgm.shipping.int8 import calibration, images_of
from fpgm.training.evaluate import accuracy, logits

EXAMPLES = """\
fpgm-compress RUN --decompose tai --energy 0.95
fpgm-compress RUN --decompose zhang --macs-target 0.7      of what RUN has left
fpgm-train arch=compact pretrained=RUN/zhang rate=0 optimizer=finetune epochs=10
"""


def compress(
    run: Path, way: str, energy: float | None, target: float | None, out: Path
) -> dict[str, Any]:
    """Write compact.pt, config.yaml and low_rank.json to `out`, and return what is in the latter.

    energy: share of each layer's that is kept; target: where energy is None, share of the run's
    compact MACs. Raises Error, BudgetError, DataError, CheckpointError; then nothing is written.
    """
    _free(out)
    config, saved = read_config(run), checkpoint.read(run / "compact.pt", ("arch", "preprocessing"))
    images = images_of(run, choose_device("auto"))
    network = load(run).to(images.device)
    convs = low_rank.decomposable(network)
    known = {}
    if way == ZHANG:
        known = low_rank.responses(network, convs, calibration(images))
        convs = {name: conv for name, conv in convs.items() if name in known}
    spectra = {name: low_rank.spectrum(conv, known.get(name)) for name, conv in convs.items()}
    layers = ranks.layers(network, spectra, images.image_shape, way)
    before = cost(network, images.image_shape)
    if energy is not None:
        chosen = ranks.by_energy(layers, energy)
    else:
        assert target is not None
        chosen = ranks.by_macs(layers, before.macs, target)
    if not chosen:
        raise BudgetError(_too_much(energy, target, layers))
    small = low_rank.decomposed(network, chosen, way, known)
    result = _result(images, network, small, layers, chosen)
    result |= {"run": run.name, "way": way, "energy": energy, "macs_target": target}
    steps = [*saved.get("low_rank", ()), {"way": way, "ranks": chosen}]
    state = {name: value.cpu() for name, value in small.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    checkpoint.write(out / "compact.pt", {**saved, "low_rank": steps, "state_dict": state})
    write_text(out / LOW_RANK, json.dumps(result, indent=2) + "\n")
    return result


def _free(out: Path) -> None:
    """Raise Error where `out` holds what this command has not written."""
    if any((out / name).exists() for name in ("report.json", "last.pt", "zeroed.pt")):
        raise Error(f"--out {out}: is a run of fpgm-train, which would be lost; another directory")
    if out.exists() and not out.is_dir():
        raise Error(f"--out {out}: is a file; give a directory")


def _too_much(energy: float | None, target: float | None, layers: Mapping[str, ranks.Layer]) -> str:
    if energy is None:
        return (
            f"--macs-target {target:g}: the network has no more than that; below 1 it gets smaller"
        )
    able = [float(layer.energy[layer.most - 1]) for layer in layers.values() if layer.most]
    best = f"--energy {math.floor(1e3 * max(able)) / 1e3:g} does in one" if able else "no rank does"
    return f"--energy {energy:g}: no layer has so much in a rank that saves MACs; {best}"


def _result(
    images: Images,
    network: nn.Module,
    small: nn.Module,
    layers: Mapping[str, ranks.Layer],
    chosen: Mapping[str, int],
) -> dict[str, Any]:
    """Accuracies in percent, MACs for one image; agreement: share of equal answers."""
    (full, labels), (reduced, _) = logits(network, images), logits(small, images)
    costs = [cost(one, images.image_shape) for one in (network, small)]
    return {
        "environment": environment(images.device, None),
        "macs": {"before": costs[0].macs, "after": costs[1].macs},
        "params": {"before": costs[0].params, "after": costs[1].params},
        "accuracy": {"before": accuracy(full, labels), "after": accuracy(reduced, labels)},
        "agreement": float((full.argmax(1) == reduced.argmax(1)).double().mean()),
        "test_images": len(labels),
        "layers": {
            name: {
                "rank": chosen.get(name),
                "of": len(layer.energy),
                "energy": float(layer.energy[chosen[name] - 1]) if name in chosen else 1.0,
                "macs": {"before": layer.whole, "after": chosen.get(name, 0) * layer.each}
                if name in chosen
                else {"before": layer.whole, "after": layer.whole},
            }
            for name, layer in layers.items()
        },
    }


def told(result: Mapping[str, Any], out: Path) -> str:
    """What has become of the network, and what to type next."""
    macs, right, count = result["macs"], result["accuracy"], len(result["layers"])
    whole = [name for name, layer in result["layers"].items() if layer["rank"] is None]
    lines = [
        f"{count - len(whole)} of {count} convolutions are two now: "
        f"{macs['before']:,} MACs -> {macs['after']:,} "
        f"({100 * (macs['after'] / macs['before'] - 1):+.1f} %)",
        f"accuracy {right['before']:.2f} % -> {right['after']:.2f} % of {result['test_images']} "
        f"test images, same answer on {100 * result['agreement']:.2f} %",
    ]
    if whole:
        why = "" if result["energy"] is None else ", two would cost as many MACs"
        lines.append(f"left as they are{why}: {', '.join(whole)}")
    lines.append(
        f"the network: {out / 'compact.pt'}; to train it on: fpgm-train arch=compact "
        f"pretrained={out} rate=0 optimizer=finetune"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-compress."""
    parser = argparse.ArgumentParser(
        "fpgm-compress", description=f"{__doc__}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of fpgm-train")
    parser.add_argument(
        "--decompose", choices=WAYS, required=True,
        help="tai: by the weights, down the image and along it; zhang: by what filters answer to "
        "training images, then 1x1",
    )  # fmt: skip
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--energy", type=float, metavar="SHARE", help="that each layer keeps")
    amount.add_argument(
        "--macs-target", type=float, metavar="SHARE", help="of the compact network's MACs"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/tai or RUN/zhang")
    words = parser.parse_args(argv)
    try:
        for key in ("energy", "macs_target"):
            value = getattr(words, key)
            if value is not None and not 0 < value <= 1:
                word = key.replace("_", "-")
                raise Error(f"--{word} {value:g}: a share above 0, at most 1, for example 0.9")
        out = words.out or words.run / words.decompose
        result = compress(words.run, words.decompose, words.energy, words.macs_target, out)
    except Exception as error:
        print(f"fpgm-compress: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    print(told(result, out))
