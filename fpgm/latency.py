"""`fpgm-latency`: the dense and the compact network of a run, side by side, by runtime."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.atomic import write_text
from fpgm.checkpoint import CheckpointError
from fpgm.compaction import load
from fpgm.counting import cost
from fpgm.export import ExportError, export
from fpgm.folding import fold
from fpgm.machine import environment

RUNTIMES = ("torch", "onnxruntime", "openvino")
INSTALL = {"onnxruntime": "pip install 'fpgm[export]'", "openvino": "pip install 'fpgm[latency]'"}
WARM_UP, ROUNDS, SECONDS = 5, 200, 6.0  # rounds end after this many seconds, but not before 10

Runner = Callable[[Tensor], object]


class LatencyError(ValueError):
    """A measurement that cannot be made."""


def require(runtime: str) -> None:
    """Raise LatencyError, with the command that installs it, where a runtime is not there."""
    if importlib.util.find_spec(runtime) is None:
        raise LatencyError(f"target={runtime}: is not installed here: {INSTALL[runtime]}")


def torch_runner(network: nn.Module, image: tuple[int, int, int], threads: int) -> Runner:
    """The folded network in torch, channels last."""
    folded = fold(network).to(memory_format=torch.channels_last)

    def run(batch: Tensor) -> object:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return folded(batch)

    return run


def onnxruntime_runner(network: nn.Module, image: tuple[int, int, int], threads: int) -> Runner:
    """The exported network in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else the threads of one session go on spinning while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "network.onnx"
        export(network, path, image, dynamic=True)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": batch.numpy()})


def openvino_runner(network: nn.Module, image: tuple[int, int, int], threads: int) -> Runner:
    """The exported network in OpenVINO, float32 as the others."""
    import openvino

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "network.onnx"
        export(network, path, image, dynamic=True)
        model = openvino.convert_model(path)
    compiled = {}

    def run(batch: Tensor) -> object:
        if len(batch) not in compiled:  # a fixed batch, as one would deploy it
            model.reshape([len(batch), *image])
            hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32",
                     "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
            compiled[len(batch)] = openvino.compile_model(model, "CPU", hints)
        return compiled[len(batch)](batch.numpy())

    return run


RUNNERS = {
    "torch": torch_runner,
    "onnxruntime": onnxruntime_runner,
    "openvino": openvino_runner,
}


def side_by_side(runners: Sequence[Runner], batch: Tensor) -> list[list[float]]:
    """Seconds of each call, the runners in turn: A B A B ..., so that a drift meets all alike."""
    for _ in range(WARM_UP):
        for run in runners:
            run(batch)
    seconds: list[list[float]] = [[] for _ in runners]
    began = time.perf_counter()
    for done in range(ROUNDS):
        if done >= 10 and time.perf_counter() - began > SECONDS:
            break
        for run, own in zip(runners, seconds, strict=True):
            start = time.perf_counter()
            run(batch)
            own.append(time.perf_counter() - start)
    return seconds


def measure(
    dense: nn.Module,
    small: nn.Module,
    image: tuple[int, int, int],
    runtimes: Sequence[str],
    batches: Sequence[int],
    threads: int,
) -> list[dict[str, Any]]:
    """A row for each runtime and batch: milliseconds (median and quartiles) and the speed-up."""
    rows = []
    for runtime in runtimes:
        runners = [RUNNERS[runtime](network, image, threads) for network in (dense, small)]
        for size in batches:
            try:
                seconds = side_by_side(runners, torch.randn(size, *image))
            except (MemoryError, RuntimeError) as error:
                raise LatencyError(
                    f"--batch {size}: {runtime} cannot run it ({str(error).splitlines()[0]}); try "
                    f"--batch {max(size // 2, 1)}"
                ) from error
            quartiles = [[1e3 * q for q in statistics.quantiles(own, n=4)] for own in seconds]
            names = ("dense_ms", "compact_ms")
            row: dict[str, Any] = {"runtime": runtime, "batch": size, "rounds": len(seconds[0])}
            row.update({name: q[1] for name, q in zip(names, quartiles, strict=True)})
            row["quartiles"] = {n: [q[0], q[2]] for n, q in zip(names, quartiles, strict=True)}
            row["speed_up"] = row["dense_ms"] / row["compact_ms"]
            rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """latency.md."""
    machine = result["environment"]
    lines = [
        f"MACs of one image: {result['macs']['dense']:,} dense, {result['macs']['compact']:,} "
        f"compact, ratio {result['macs']['ratio']:.2f}. {machine['processor']}, "
        f"{result['threads']} threads, torch {machine['torch']}; both in turn, medians.",
        "",
        "| runtime | batch | dense, ms | compact, ms | speed-up | of the MACs ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        share = row["speed_up"] / result["macs"]["ratio"]
        lines.append(
            f"| {row['runtime']} | {row['batch']} | {row['dense_ms']:.2f} | "
            f"{row['compact_ms']:.2f} | {row['speed_up']:.2f} | {share:.2f} |"
        )
    return "\n".join([*lines, ""])


def latency_of_run(
    directory: Path, runtimes: Sequence[str], batches: Sequence[int], threads: int
) -> dict[str, Any]:
    """Measure a run's networks and write latency.json and latency.md into its directory."""
    if not (directory / "report.json").exists():
        raise ExportError(f"{directory}: no report.json, so that run is not done; finish it first")
    dense, small = load(directory / "zeroed.pt"), load(directory / "compact.pt")
    saved = torch.load(directory / "compact.pt", weights_only=True)["preprocessing"]
    c, h, w = saved["image_shape"]
    macs = [cost(network, (c, h, w)).macs for network in (dense, small)]
    result = {
        "environment": environment(torch.device("cpu"), None),
        "threads": threads,
        "macs": {"dense": macs[0], "compact": macs[1], "ratio": macs[0] / macs[1]},
        "rows": measure(dense, small, (c, h, w), runtimes, batches, threads),
    }
    write_text(directory / "latency.json", json.dumps(result, indent=2) + "\n")
    write_text(directory / "latency.md", markdown(result))
    return result


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-latency."""
    parser = argparse.ArgumentParser(prog="fpgm-latency", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of fpgm-train")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="default: %(default)s")
    parser.add_argument("--batch", default="1,128", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    words = parser.parse_args(argv)
    try:
        runtimes = words.runtimes.split(",")
        unknown = [name for name in runtimes if name not in RUNTIMES]
        if unknown:
            raise LatencyError(f"--runtimes {unknown[0]}: choose from {', '.join(RUNTIMES)}")
        if not all(size.isdigit() and int(size) > 0 for size in words.batch.split(",")):
            raise LatencyError(f"--batch {words.batch}: whole numbers with commas, as in 1,128")
        there = [name for name in runtimes if importlib.util.find_spec(name) is not None]
        for name in set(runtimes) - set(there):
            print(f"{name} is not installed and is left out: {INSTALL[name]}", file=sys.stderr)
        sizes = [int(size) for size in words.batch.split(",")]
        result = latency_of_run(words.run, there, sizes, words.threads)
    except (LatencyError, ExportError, CheckpointError, OSError) as error:
        print(f"fpgm-latency: {error}", file=sys.stderr)
        sys.exit(1)
    print(markdown(result), end="")
