"""`fpgm-latency`: the dense and the compact network of a run, side by side, by runtime.

Without a run: of networks by name, as in FPGM's table 5.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fpgm.compaction.compact import load
from fpgm.data.images import Images
from fpgm.errors import Error, ShippingError
from fpgm.graph.cost import cost
from fpgm.graph.groups import RESIDUAL
from fpgm.machine.apart import contained
from fpgm.machine.device import environment, keep_freed_memory
from fpgm.runs.files import write_text
from fpgm.runs.run import read_config, require_done
from fpgm.shipping import architectures, int8
from fpgm.shipping.architectures import PIXELS, RATE, Request
from fpgm.shipping.runtimes import GPU, INSTALL, ONNX, RUNTIMES, Runner, exported, installed

WARM_UP, ROUNDS, SECONDS = 5, 200, 6.0  # rounds end after this many seconds, but not before 10
CPU = torch.device("cpu")
BATCHES = {True: "1,128", False: "64"}  # of a run; of networks by name, as in the paper


def side_by_side(
    runners: Sequence[Runner], batch: Tensor, limit: float = SECONDS
) -> list[list[float]]:
    """Seconds of each call, the runners in turn: A B A B ..., so that a drift meets all alike.

    limit: seconds after which no new round begins, but for the first ten."""
    for _ in range(WARM_UP):
        for run in runners:
            run(batch)
    seconds: list[list[float]] = [[] for _ in runners]
    began = time.perf_counter()
    for done in range(ROUNDS):
        if done >= 10 and time.perf_counter() - began > limit:
            break
        for run, times in zip(runners, seconds, strict=True):
            start = time.perf_counter()
            run(batch)
            times.append(time.perf_counter() - start)
    return seconds


def measure(
    dense: nn.Module,
    small: nn.Module,
    image: tuple[int, int, int],
    runtimes: Sequence[str],
    batches: Sequence[int],
    threads: int,
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    """A row for each runtime and batch: milliseconds (median and quartiles) and the speed-up.

    On a GPU the batch lies in its memory before the clock starts."""
    rows = []
    kinds = RUNTIMES if device.type == "cpu" else GPU
    for runtime in runtimes:
        networks = {"dense_ms": dense, "compact_ms": small}
        runners = {key: kinds[runtime](net, image, threads) for key, net in networks.items()}
        rows += _rows(runtime, runners, image, batches, device)
    return rows


def measure_models(
    models: Mapping[str, bytes],
    image: tuple[int, int, int],
    runtime: str,
    batches: Sequence[int],
    threads: int,
) -> list[dict[str, Any]]:
    """The same of ONNX models of any batch, in one runtime. models: by the key of their times, of
    which there are dense_ms and compact_ms."""
    runners = {key: ONNX[runtime](model, image, threads) for key, model in models.items()}
    return _rows(runtime, runners, image, batches)


def measure_int8(
    dense: nn.Module,
    small: nn.Module,
    images: Images,
    runtimes: Sequence[str],
    batches: Sequence[int],
    threads: int,
    residual: str,
) -> dict[str, Any]:
    """Both networks in float and in int8, in turn: rows, what int8 answers, and warnings of what
    was not timed.

    OpenVINO runs in processes of its own; residual: the run's, for what is said where it fails.
    """
    image, calibrated = images.image_shape, int8.calibration(images)
    full, made, answers = {}, {}, {}
    for name, network in (("dense", dense), ("compact", small)):
        full[f"{name}_ms"] = model = exported(network, image)
        quantised = int8.quantise(model, calibrated)
        made[f"{name}_int8_ms"] = quantised.model
        sizes = {"float": len(model), "int8": len(quantised.model)}
        answers[name] = {**int8.checked(model, quantised.model, images), "bytes": sizes}
    rows, warnings = [], []
    for runtime in runtimes:
        if runtime not in ONNX:
            warnings.append(f"{runtime}: has no int8 here, its times are of float alone")
            rows += measure(dense, small, image, [runtime], batches, threads)
            continue
        models, given = {**full, **made}, (image, runtime, batches, threads)
        if runtime == "openvino":
            for key, model in made.items():
                why = int8.refused_by_openvino(model, image)
                if why is not None:
                    what = key.split("_")[0]
                    warnings.append(int8.openvino_warning(what, why, residual))
                    del models[key]
            crashed = f"{runtime}: crashed while it was timed; --runtimes onnxruntime"
            rows += contained(crashed, measure_models, models, *given)
        else:
            rows += measure_models(models, *given)
    for row in rows:
        if "compact_int8_ms" in row:
            row["int8_speed_up"] = row["dense_ms"] / row["compact_int8_ms"]
    return {"rows": rows, "int8": answers, "warnings": warnings}


def _rows(
    runtime: str,
    runners: Mapping[str, Runner],
    image: tuple[int, int, int],
    batches: Sequence[int],
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    """A row for each batch. runners: by the key of their times. Raises ShippingError."""
    rows = []
    for size in batches:
        try:
            batch = torch.randn(size, *image).to(device)
            seconds = side_by_side(list(runners.values()), batch)
        except Exception as error:  # every runtime has its own kinds
            raise ShippingError(
                f"--batch {size}: {runtime} cannot run it ({str(error).splitlines()[0]}); try "
                f"--batch {max(size // 2, 1)}"
            ) from error
        row: dict[str, Any] = {"runtime": runtime, "batch": size, "rounds": len(seconds[0])}
        row["quartiles"] = {}
        for name, times in zip(runners, seconds, strict=True):
            low, row[name], high = (1e3 * q for q in statistics.quantiles(times, n=4))
            row["quartiles"][name] = [low, high]
        row["speed_up"] = row["dense_ms"] / row["compact_ms"]
        rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """latency.md."""
    machine, int8_there = result["environment"], "int8" in result
    more = "dense int8, ms | compact int8, ms | int8 speed-up |" if int8_there else ""
    lines = [
        f"MACs of one image: {result['macs']['dense']:,} dense, {result['macs']['compact']:,} "
        f"compact, ratio {result['macs']['ratio']:.2f}. {machine['processor']}, "
        f"{result['threads']} threads, torch {machine['torch']}; both in turn, medians.",
        "",
        "| runtime | batch | dense, ms | compact, ms | speed-up | of the MACs ratio |"
        + (f" {more}" if more else ""),
        "|---|---:|---:|---:|---:|---:|" + "---:|" * more.count("|"),
    ]
    for row in result["rows"]:
        share = row["speed_up"] / result["macs"]["ratio"]
        lines.append(
            f"| {row['runtime']} | {row['batch']} | {row['dense_ms']:.2f} | "
            f"{row['compact_ms']:.2f} | {row['speed_up']:.2f} | {share:.2f} |"
        )
        if int8_there:
            keys = ("dense_int8_ms", "compact_int8_ms", "int8_speed_up")
            lines[-1] += "".join(f" {row[key]:.2f} |" if key in row else " |" for key in keys)
    return "\n".join([*lines, *_int8_notes(result), ""])


def _int8_notes(result: Mapping[str, Any]) -> list[str]:
    """What int8 answers, and what was not timed; a paragraph each."""
    notes = []
    if "int8" in result:
        said = "; ".join(
            f"{name} {one['accuracy']['float']:.2f} -> {one['accuracy']['int8']:.2f} %, "
            f"{one['bytes']['float']:,} -> {one['bytes']['int8']:,} bytes"
            for name, one in result["int8"].items()
        )
        count = result["int8"]["compact"]["test_images"]
        notes = [
            f"int8 speed-up: compact int8 against dense float. Float -> int8, accuracy on {count} "
            f"test images and the ONNX model: {said}.",
            *result["warnings"],
        ]
    return [line for note in notes for line in ("", note)]


def latency_of_run(
    directory: Path,
    runtimes: Sequence[str],
    batches: Sequence[int],
    threads: int,
    in_int8: bool = False,
) -> dict[str, Any]:
    """Measure a run's networks and write latency.json and latency.md into its directory.

    in_int8: both in int8 too, calibrated and checked on the run's images. Raises Error."""
    require_done(directory)
    keep_freed_memory()
    dense, small = load(directory / "zeroed.pt"), load(directory / "compact.pt")
    saved = torch.load(directory / "compact.pt", weights_only=True)["preprocessing"]
    c, h, w = saved["image_shape"]
    macs = [cost(network, (c, h, w)).macs for network in (dense, small)]
    result = {
        "environment": environment(torch.device("cpu"), None),
        "threads": threads,
        "macs": {"dense": macs[0], "compact": macs[1], "ratio": macs[0] / macs[1]},
    }
    if in_int8:
        how = (runtimes, batches, threads, read_config(directory)["residual"])
        result |= measure_int8(dense, small, int8.images_of(directory), *how)
    else:
        result["rows"] = measure(dense, small, (c, h, w), runtimes, batches, threads)
    write_text(directory / "latency.json", json.dumps(result, indent=2) + "\n")
    write_text(directory / "latency.md", markdown(result))
    return result


def latency_of_architectures(
    requests: Sequence[Request],
    runtimes: Sequence[str],
    batches: Sequence[int],
    threads: int,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Build and time networks by name, one after the other. Raises Error."""
    keep_freed_memory()
    rows = []
    for request in tqdm(requests, "networks", leave=False, disable=None):
        two = architectures.pair(request)
        try:
            timed = measure(two.dense, two.small, request.shape, runtimes, batches, threads, device)
        except ShippingError as error:
            raise ShippingError(f"--arch {request.arch}: {error}") from error
        rows += [architectures.row(two, row) for row in timed]
    return {"environment": environment(device, None), "threads": threads, "rows": rows}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="fpgm-latency", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("run", type=Path, nargs="?", metavar="RUN", help="directory of fpgm-train")
    words.add_argument("--runtimes", help=f"default: {','.join(RUNTIMES)}; on a GPU torch alone")
    words.add_argument(
        "--batch", help=f"default: {BATCHES[True]}; of networks by name {BATCHES[False]}"
    )
    words.add_argument("--threads", type=int, default=torch.get_num_threads())
    words.add_argument("--int8", action="store_true", help="both of a run in int8 beside float")
    fresh = words.add_argument_group("without a run")
    add = fresh.add_argument
    add("--arch", metavar="NAMES", help="networks by name; a number is a ResNet: resnet18,34,50")
    add("--rate", metavar="RATES", help=f"one for all, or one for each; default: {RATE:g}")
    add("--device", choices=("cpu", "cuda"), help="default: cpu")
    add("--residual", choices=RESIDUAL, help=f"default: {RESIDUAL[0]}, as in the papers")
    add("--align", type=int, metavar="N", help="widths are multiples of it; default: 1")
    add("--image", type=int, metavar="PIXELS", help=f"default: {PIXELS[False]}, of torchvision's "
        f"networks {PIXELS[True]}")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="writes latency_table5.json and .md there")
    return words


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-latency."""
    words = parser().parse_args(argv)
    try:
        printed = _of_names(words) if _by_name(words) else _of_run(words)
    except (Error, OSError) as error:
        print(f"fpgm-latency: {error}", file=sys.stderr)
        sys.exit(1)
    print(printed, end="")


def _by_name(words: argparse.Namespace) -> bool:
    """Whether networks are given by name and not by a run. Raises ShippingError where it is both,
    or neither."""
    if words.run is None and words.arch is None:
        raise ShippingError(
            "give a run directory, as in fpgm-latency outputs/my_run, or networks by name, as in "
            "fpgm-latency --arch resnet18,34 --rate 0.3"
        )
    if words.run is None:
        if words.int8:
            raise ShippingError(
                f"--arch {words.arch}: --int8 needs a run, whose images it is calibrated on"
            )
        return True
    if words.arch is not None:
        raise ShippingError(
            f"{words.run} and --arch {words.arch}: one of them; fpgm-latency {words.run}, or "
            f"fpgm-latency --arch {words.arch}"
        )
    for name in ("rate", "device", "residual", "align", "image", "out"):
        if getattr(words, name) is not None:
            raise ShippingError(
                f"--{name} {getattr(words, name)}: only with --arch; a run is timed as it is"
            )
    return False


def _of_run(words: argparse.Namespace) -> str:
    there, sizes = _runtimes(words.runtimes), _sizes(words.batch or BATCHES[True])
    if words.int8 and not installed("onnxruntime"):
        raise ShippingError(f"--int8: onnxruntime makes it; {INSTALL['onnxruntime']}")
    return markdown(latency_of_run(words.run, there, sizes, words.threads, words.int8))


def _of_names(words: argparse.Namespace) -> str:
    names = architectures.named(words.arch)
    asked = architectures.rates(words.rate or f"{RATE}", len(names))
    structure = {key: getattr(words, key) for key in ("residual", "align", "image")}
    for key in ("align", "image"):
        if structure[key] is not None and structure[key] < 1:
            raise ShippingError(f"--{key} {structure[key]}: must be at least 1")
    structure = {key: value for key, value in structure.items() if value is not None}
    device, sizes = torch.device(words.device or "cpu"), _sizes(words.batch or BATCHES[False])
    if device.type == "cuda":
        if words.runtimes not in (None, *GPU):
            raise ShippingError(f"--runtimes {words.runtimes}: on a GPU only {', '.join(GPU)}")
        if not torch.cuda.is_available():
            raise ShippingError("--device cuda: torch sees no GPU here; use --device cpu")
        there = list(GPU)
    else:
        there = _runtimes(words.runtimes)
    if words.out is not None:
        words.out.mkdir(parents=True, exist_ok=True)  # before minutes of timing
    requests = [Request(name, rate, **structure) for name, rate in zip(names, asked, strict=True)]
    result = latency_of_architectures(requests, there, sizes, words.threads, device)
    printed = architectures.markdown(result)
    if words.out is not None:
        write_text(words.out / "latency_table5.json", json.dumps(result, indent=2) + "\n")
        write_text(words.out / "latency_table5.md", printed)
    return printed


def _runtimes(given: str | None) -> list[str]:
    """Those asked for that are installed; the others are named. Raises ShippingError."""
    runtimes = given.split(",") if given is not None else list(RUNTIMES)
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise ShippingError(f"--runtimes {unknown[0]}: choose from {', '.join(RUNTIMES)}")
    there = [name for name in runtimes if installed(name)]
    for name in set(runtimes) - set(there):
        print(f"{name} is not installed and is left out: {INSTALL[name]}", file=sys.stderr)
    return there


def _sizes(given: str) -> list[int]:
    """Batch sizes. Raises ShippingError."""
    if not all(size.isdigit() and int(size) > 0 for size in given.split(",")):
        raise ShippingError(f"--batch {given}: whole numbers with commas, as in 1,128")
    return [int(size) for size in given.split(",")]
