"""`fpgm-export`: the compact network of a run as ONNX, float or int8, or as torch.export's .pt2,
checked."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.compaction.compact import compare, load
from fpgm.errors import Error, ShippingError
from fpgm.runs.run import read_config, require_done
from fpgm.shipping import int8
from fpgm.shipping.folding import fold

LIMIT = 1e-4  # of the largest output: another runtime sums in another order
CHECKED = 256  # test images
LARGEST = 2**20  # images in a batch; without a limit torch 2.6 does not export


def export(network: nn.Module, path: Path, image: tuple[int, int, int], dynamic: bool) -> None:
    """Write a network with folded BatchNorms to `path`, .onnx or .pt2.

    image: (C, H, W); dynamic: the batch may be of any size, else it is 1. Raises ShippingError.
    """
    folded = fold(network)
    example = torch.zeros(2 if dynamic else 1, *image)
    shapes = ({0: torch.export.Dim("batch", max=LARGEST)},) if dynamic else None
    try:
        if path.suffix == ".pt2":
            torch.export.save(torch.export.export(folded, (example,), dynamic_shapes=shapes), path)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                folded, (example,), dynamic_shapes=shapes, dynamo=True, verbose=False,
                input_names=["images"], output_names=["logits"],
            )  # fmt: skip
        assert program is not None
        program.save(path)
    except ImportError as error:
        raise ShippingError(
            f"{error}; install what export needs: pip install 'fpgm[export]'"
        ) from error


def run_exported(path: Path, images: Tensor, dynamic: bool) -> Tensor:
    """Outputs of an exported network for images (n, C, H, W), one by one if its batch is 1."""
    batches = images.split(len(images) if dynamic else 1)
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return torch.cat([module(batch) for batch in batches])
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [session.run(None, {name: batch.numpy()})[0] for batch in batches]
    return torch.cat([torch.from_numpy(output) for output in outputs])


def export_run(directory: Path, kind: str, dynamic: bool) -> tuple[Path, dict[str, float]]:
    """Export a run's compact network beside it; returns the file and how far it is off.

    Raises Error if the run is not done, ShippingError if the exported network differs by more than
    1e-4.
    """
    require_done(directory)
    if kind == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        raise ShippingError("--format onnx: needs pip install 'fpgm[export]'")
    images = int8.images_of(directory)
    network = load(directory / "compact.pt")
    path = directory / f"compact.{kind}"
    export(network, path, images.image_shape, dynamic)
    some, _ = next(images.tests(CHECKED))
    some = some.contiguous()
    with torch.inference_mode():
        difference = compare(network(some), run_exported(path, some, dynamic))
    if not difference["max_abs_diff"] <= LIMIT * difference["max_abs_logit"]:
        path.rename(path.with_suffix(path.suffix + ".wrong"))
        raise ShippingError(
            f"{path}: differs from the torch network by {difference['max_abs_diff']:.3g} of "
            f"{difference['max_abs_logit']:.3g}, kept as {path.name}.wrong"
        )
    return path, difference


def int8_run(path: Path, max_loss: float) -> dict[str, Any]:
    """Quantise what export_run has written to `path`, calibrated and checked on its run's images;
    see int8.deliver."""
    residual = read_config(path.parent)["residual"]
    return int8.deliver(path, int8.images_of(path.parent), residual, max_loss)


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-export."""
    parser = argparse.ArgumentParser(prog="fpgm-export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of fpgm-train")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx")
    parser.add_argument("--dynamic-batch", action="store_true", help="any batch size, else 1")
    parser.add_argument("--int8", action="store_true", help=f"{int8.FILE} beside the float one")
    parser.add_argument(
        "--max-loss", type=float, metavar="POINTS",
        help=f"of accuracy that int8 may lose; default: {int8.MAX_LOSS:g}",
    )  # fmt: skip
    words = parser.parse_args(argv)
    try:
        max_loss = _max_loss(words)
        path, difference = export_run(words.run, words.format, words.dynamic_batch)
        quantised = int8_run(path, max_loss) if words.int8 else None
    except (Error, OSError) as error:
        print(f"fpgm-export: {error}", file=sys.stderr)
        sys.exit(1)
    print(
        f"{path}: {path.stat().st_size:,} bytes, off by {difference['max_abs_diff']:.1e} of "
        f"{difference['max_abs_logit']:.1f} on {difference['images']} test images, same answer on "
        f"{100 * difference['agreement']:.2f} %"
    )
    if quantised is not None:
        print(int8.told(quantised, path.with_name(int8.FILE)))
        for warning in quantised["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)


def _max_loss(words: argparse.Namespace) -> float:
    """Points. Raises ShippingError for words that do not go together."""
    if words.int8 and words.format != "onnx":
        raise ShippingError(
            f"--format {words.format}: int8 is made by ONNX Runtime's quantiser; --int8 needs "
            "--format onnx"
        )
    if words.max_loss is None:
        return int8.MAX_LOSS
    if not words.int8:
        raise ShippingError(f"--max-loss {words.max_loss:g}: only with --int8")
    if not (math.isfinite(words.max_loss) and words.max_loss >= 0):
        raise ShippingError(f"--max-loss {words.max_loss:g}: points of accuracy, 0 or more")
    return float(words.max_loss)
