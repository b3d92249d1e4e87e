"""What one run has to say: its lines while it runs, report.json, report.md, the closing table.

No torch: a run that is done is printed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fpgm.keys import network_words
from fpgm.runs.run import SCHEMA

if TYPE_CHECKING:
    from fpgm.config import Config
    from fpgm.graph.cost import Cost

COSTLY_ZEROING = 5.0  # points of accuracy


def opening_line(
    config: Config, rate: float, images: str, macs: tuple[int, int], machine: str
) -> str:
    """What is about to happen: the rate found, the MACs (full width, compact) it will lead to."""
    dense, small = macs
    return (
        f"{network_words(config.arch)} on {config.dataset.name} ({images}), "
        f"{config.criterion.name}, {config.schedule.name}, {_asked(config, rate)}: "
        f"{dense:,} MACs -> about {small:,} "
        f"({100 * (small / dense - 1):+.1f} %), epochs {config.epochs}, {machine}"
    )


def _asked(config: Config, rate: float) -> str:
    amount = f"rate {config.rate}"
    if config.macs_target is not None:
        amount = f"macs_target {config.macs_target} (rate {rate:.3f})"
    if config.rates:
        amount += f", of {len(config.rates)} patterns their own"
    if config.widths:
        amount = "widths by layer"
    if config.threshold is not None:
        amount = f"threshold {config.threshold:g}"
    if config.latency_target is not None:
        amount = f"latency_target {config.latency_target} in {config.target}"
    if config.ignore:
        amount += f" but for {', '.join(config.ignore)}"
    residual = "" if config.residual == "independent" else f" residual {config.residual}"
    ranked = f"{config.scope_norm}{_over(config.scope_cost)}"
    scope = f" scope {config.scope} ({ranked})" if config.scope != "layer" else ""
    return amount + residual + scope + (f" align {config.align}" if config.align > 1 else "")


def _over(cost: str) -> str:
    return "" if cost == "none" else f", over {cost}"


def epoch_line(row: Mapping[str, Any], epochs: int, judged_on: str) -> str:
    """One epoch of the history, for the screen."""
    width, whose = len(str(epochs)), "held-out " if judged_on == "validation" else ""
    return (
        f"epoch {row['epoch']:{width}}/{epochs}  loss {row['train_loss']:.4f}  "
        f"{whose}accuracy {row['accuracy_before']:.2f} -> {row['accuracy_after']:.2f} % zeroed  "
        f"churn {row['churn']:.3f}  revived {row['revived']}  dead {row['dead']} of "
        f"{row['pruned']}  {row['seconds']:.1f} s"
    )


def report(
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    readings: Mapping[str, float | None],
    judged_on: str,
    costs: tuple[Cost, Cost],
    sizes: tuple[int, int],
    packed: Mapping[str, Any] | None,
    paper_macs: float | None,
    accuracies: tuple[float, float],
    top5: float | None,
    equivalence: Mapping[str, float],
    kept: Mapping[str, int],
    collapsed: Sequence[str],
    settled: Mapping[str, Any] | None,
    tuning: Mapping[str, Any] | None,
    latency: Mapping[str, Any] | None,
    methods: Mapping[str, Mapping[str, Any]],
    kept_full: Mapping[str, str],
    problems: Sequence[str],
    train_images: int,
) -> dict[str, Any]:
    """report.json. Pairs are (full width, compact); accuracies and reductions in percent; readings:
    on the test images (training.task.Readings); judged_on: the images of the history's accuracies,
    validation or test."""
    dense, small = costs
    after = {layer.name: layer for layer in small.layers}
    kept = {layer.name: kept.get(layer.name, layer.filters) for layer in dense.layers}
    return {
        "schema": SCHEMA,
        "status": "done",
        "config": config,
        "environment": environment,
        "dense": {"macs": dense.macs, "params": dense.params, "bytes": sizes[0]},
        "compact": {
            "macs": small.macs,
            "macs_per_batch": small.macs_per_batch,
            "params": small.params,
            "bytes": sizes[1],
            "packed": packed,
        },
        "reduction": {
            "macs": 100 * (1 - small.macs / dense.macs),
            "params": 100 * (1 - small.params / dense.params),
            "paper_macs": paper_macs,
        },
        "accuracy": _accuracy(history, readings, judged_on, accuracies, top5),
        "equivalence": equivalence,
        "pruning": {
            "pruned_filters": sum(a.filters - kept[a.name] for a in dense.layers),
            "churn": [row["churn"] for row in history],
            "revived": [row["revived"] for row in history],
            "dead_filters": history[-1]["dead"] if history else 0,
            "collapsed": list(collapsed),
            "settled": settled,
            "kept_full": kept_full,
        },
        "layers": [
            {
                "name": layer.name,
                "filters": layer.filters,
                "kept": kept[layer.name],
                "compact": after[layer.name].filters,
                "macs_dense": layer.macs,
                "macs_compact": after[layer.name].macs,
            }
            for layer in dense.layers
        ],
        "tuning": tuning,
        "latency": latency,
        "methods": methods,
        "warnings": [*_warnings(history, readings["trained"], accuracies[0]), *problems],
        "timing": _timing(history, train_images),
    }


def _accuracy(
    history: Sequence[Mapping[str, Any]],
    readings: Mapping[str, float | None],
    judged_on: str,
    accuracies: tuple[float, float],
    top5: float | None,
) -> dict[str, Any]:
    # Without an epoch the network is as it was given, then as it was zeroed.
    at_end = {"epoch": 0, "accuracy_after": accuracies[0]}
    best = max(history, key=lambda row: row["accuracy_after"], default=at_end)
    held_out = bool(history) and judged_on == "validation"
    return {
        "dense": readings["trained"] if history else readings["given"],
        "first_zeroing": readings["zeroed"],
        "zeroed_last": accuracies[0],
        "compact_last": accuracies[1],
        "compact_last_top5": top5,
        "validation_last": history[-1]["accuracy_after"] if held_out else None,
        "best": {
            "zeroed": best["accuracy_after"],
            "epoch": best["epoch"],
            "chosen_on": judged_on if history else "test",
        },
    }


def _timing(history: Sequence[Mapping[str, Any]], train_images: int) -> dict[str, float]:
    spent = {key: sum(row[key] for row in history) for key in ("train_s", "prune_s", "eval_s")}
    speed = train_images * len(history) / spent["train_s"] if history else 0.0
    return {**spent, "images_per_s": speed}


def _warnings(
    history: Sequence[Mapping[str, Any]], before: float | None, zeroed: float
) -> list[str]:
    # Without an epoch what pruning alone costs is what was asked.
    if before is None or before - zeroed <= COSTLY_ZEROING:
        return []
    cost = f"the last zeroing cost {before - zeroed:.1f} points ({before:.2f} -> {zeroed:.2f} %)"
    last = history[-1]
    if not last["revived"]:
        return [cost]
    return [
        f"{cost}: {last['revived']} of {last['pruned']} pruned filters had grown back; "
        "schedule=frozen holds them at zero, schedule.settle=0.6 does so for the last epochs"
    ]


def result_line(report: Mapping[str, Any]) -> str:
    """A run's result among those of a sweep."""
    return (
        f"{report['accuracy']['compact_last']:.2f} %, {report['compact']['macs']:,} MACs "
        f"({0 - report['reduction']['macs']:+.1f} %)"
    )


def table(report: Mapping[str, Any], directory: str) -> str:
    """The closing table."""
    dense, small, cut = report["dense"], report["compact"], report["reduction"]
    accuracy, same = report["accuracy"], report["equivalence"]
    rows = [
        ("", "dense", "compact", "change"),
        _changed("MACs", dense["macs"], small["macs"]),
        _changed("parameters", dense["params"], small["params"]),
        _changed("file, bytes", dense["bytes"], small["bytes"]),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))])
        for row in rows
    ]
    if cut["paper_macs"] is not None:
        lines.append(f"the papers' closed form for this rate: {0 - cut['paper_macs']:+.2f} % MACs")
    if small.get("packed"):  # reports of before have none
        lines.append(_packed_line(small["packed"], dense["bytes"], directory))
    collapsed = report["pruning"].get("collapsed", [])
    if collapsed:
        lines.append(f"pruned down to the floor, {len(collapsed)} layers: {', '.join(collapsed)}")
    if report.get("tuning"):
        lines.append(_tuning_line(report["tuning"]))
    if report.get("latency"):  # reports of before have none
        lines += _latency_lines(report["latency"])
    closings = report.get("methods", {}).values()  # reports of before have none
    lines += [values["said"] for values in closings if "said" in values]
    first = accuracy.get("first_zeroing")  # reports of before have none
    untrained = report["config"]["epochs"] == 0
    if first is not None and not untrained:
        lines.append(f"accuracy right after the first zeroing, before any training {first:.2f} %")
    what = "of the given network" if untrained else "before the last zeroing"
    lines += [
        f"accuracy {what} {accuracy['dense']:.2f} %, "
        f"zeroed {accuracy['zeroed_last']:.2f} %, compact {accuracy['compact_last']:.2f} %",
        f"compact against zeroed on {same['images']} test images: largest difference "
        f"{same['max_abs_diff']:.1e} of {same['max_abs_logit']:.1f}, "
        f"same answer on {100 * same['agreement']:.2f} %",
        f"the network: {directory}/compact.pt",
    ]
    return "\n".join(lines)


def _changed(what: str, before: int, after: int) -> tuple[str, str, str, str]:
    return what, f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.2f} %"


def _packed_line(packed: Mapping[str, Any], dense: int, directory: str) -> str:
    return (
        f"packed in codes of {packed['bits']} bits: {directory}/{packed['file']}, "
        f"{packed['bytes']:,} bytes, {dense / packed['bytes']:.1f} times smaller than dense"
    )


def _latency_lines(latency: Mapping[str, Any]) -> list[str]:
    lines = [
        f"latency_target {latency['asked']:g} in {latency['target']}, batch {latency['batch']}, "
        f"{latency['threads']} threads: dense {latency['dense_ms']:.2f} ms, predicted "
        f"{latency['predicted_ms']:.2f}, measured {latency['measured_ms']:.2f}"
    ]
    if latency["final"]:
        lines[0] += f"; trained {latency['final']['compact_ms']:.2f} "
        lines[0] += f"({latency['final']['share']:.3f} of {latency['final']['dense_ms']:.2f})"
    if latency["free"]:
        free = ", ".join(f"{layer} {count}" for layer, count in latency["free"].items())
        lines.append(f"filters that stay as they cost no time: {free}")
    return lines


def _tuning_line(tuning: Mapping[str, Any]) -> str:
    times = {row["form"]: row["ms"] for row in tuning["tried"]}  # the later round's
    return (
        f"tuned for {tuning['target']}, batch {tuning['batch']}, {tuning['threads']} threads: "
        f"{tuning['form']}, {times[tuning['form']]:.2f} ms, full width "
        f"{times['full width']:.2f} ms"
    )


def markdown(report: Mapping[str, Any], directory: str) -> str:
    """report.md: the closing table, the layers and the epochs of one run."""
    config, environment = report["config"], report["environment"]
    churn, best = report["pruning"]["churn"], report["accuracy"]["best"]
    speed = f": {report['timing']['images_per_s']:.0f} training images a second" if churn else ""
    lines = [
        f"# {network_words(config['arch'])} on {config['dataset']['name']}: "
        f"{config['criterion']['name']}, {config['schedule']['name']}, rate {config['rate']}",
        "",
        "```",
        table(report, directory),
        "```",
        "",
        *(f"**Warning**: {warning}\n" for warning in report["warnings"]),
        f"Measured on {environment['processor']} ({environment['device']}, "
        f"{environment['threads']} threads, {environment['precision']}), torch "
        f"{environment['torch']}{speed}.",
        f"Best epoch, chosen on the {best['chosen_on']} images: {best['zeroed']:.2f} % zeroed at "
        f"epoch {best['epoch']}."
        if churn
        else "Nothing was trained.",
        "",
        "| layer | filters | kept | MACs dense | MACs compact |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {layer['name']} | {layer['filters']} | {layer['kept']} | "
            f"{layer['macs_dense']:,} | {layer['macs_compact']:,} |"
            for layer in report["layers"]
        ),
        "",
    ]
    if churn:
        lines += ["| epoch | churn | revived |", "|---:|---:|---:|"]
        by_epoch = zip(churn, report["pruning"]["revived"], strict=True)
        lines += [f"| {at} | {c:.3f} | {revived} |" for at, (c, revived) in enumerate(by_epoch, 1)]
        lines.append("")
    if report["pruning"]["kept_full"]:
        lines += ["Kept at full width:", ""]
        lines += [f"- `{name}`: {why}" for name, why in report["pruning"]["kept_full"].items()]
        lines.append("")
    return "\n".join(lines)
