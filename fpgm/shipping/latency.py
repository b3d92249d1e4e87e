"""`fpgm-latency`: the dense and the compact network of a run, side by side, by runtime."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.compaction.compact import load
from fpgm.errors import Error, ShippingError
from fpgm.graph.cost import cost
from fpgm.machine.device import environment, keep_freed_memory
from fpgm.runs.files import write_text
from fpgm.shipping.runtimes import INSTALL, RUNTIMES, Runner, installed

WARM_UP, ROUNDS, SECONDS = 5, 200, 6.0  # rounds end after this many seconds, but not before 10


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
) -> list[dict[str, Any]]:
    """A row for each runtime and batch: milliseconds (median and quartiles) and the speed-up."""
    rows = []
    for runtime in runtimes:
        runners = [RUNTIMES[runtime](network, image, threads) for network in (dense, small)]
        for size in batches:
            try:
                batch = torch.randn(size, *image)
                seconds = side_by_side(runners, batch)
            except Exception as error:  # every runtime has its own kinds
                raise ShippingError(
                    f"--batch {size}: {runtime} cannot run it ({str(error).splitlines()[0]}); try "
                    f"--batch {max(size // 2, 1)}"
                ) from error
            row: dict[str, Any] = {"runtime": runtime, "batch": size, "rounds": len(seconds[0])}
            row["quartiles"] = {}
            for name, times in zip(("dense_ms", "compact_ms"), seconds, strict=True):
                low, row[name], high = (1e3 * q for q in statistics.quantiles(times, n=4))
                row["quartiles"][name] = [low, high]
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
        raise ShippingError(
            f"{directory}: no report.json, so that run is not done; finish it first"
        )
    keep_freed_memory()
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
            raise ShippingError(f"--runtimes {unknown[0]}: choose from {', '.join(RUNTIMES)}")
        if not all(size.isdigit() and int(size) > 0 for size in words.batch.split(",")):
            raise ShippingError(f"--batch {words.batch}: whole numbers with commas, as in 1,128")
        there = [name for name in runtimes if installed(name)]
        for name in set(runtimes) - set(there):
            print(f"{name} is not installed and is left out: {INSTALL[name]}", file=sys.stderr)
        sizes = [int(size) for size in words.batch.split(",")]
        result = latency_of_run(words.run, there, sizes, words.threads)
    except (Error, OSError) as error:
        print(f"fpgm-latency: {error}", file=sys.stderr)
        sys.exit(1)
    print(markdown(result), end="")
