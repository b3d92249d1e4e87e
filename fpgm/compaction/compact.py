"""From a network and the filters to keep to a smaller network that computes the same function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fpgm.compaction.constants import Analysis, Keep, analyse
from fpgm.compaction.rewriting import rewrite
from fpgm.errors import CheckpointError
from fpgm.graph.trace import trace
from fpgm.networks.layers import split
from fpgm.networks.models import model as build_model
from fpgm.networks.modes import evaluating, exact
from fpgm.runs.checkpoint import read


def compact(
    model: nn.Module,
    keep: Keep,
    ballast: Keep | None = None,
    image: tuple[int, int, int] | None = None,
) -> fx.GraphModule:
    """The function of `model` with the filters outside `keep` zeroed, without those filters.

    keep: layer -> indices of kept filters; layers it does not name are kept whole; ballast: filters
    that stay as zeros beside those kept, where that runs faster (shipping.tuning); image: (C, H, W)
    of what it is given, where the way through the network's code depends on that: the compact one
    then raises ValueError for a size that would go another way.
    Returns a new network in eval mode and leaves `model` as it is. Raises GraphError where `keep`
    names what cannot be pruned and where the network cannot be traced.
    """
    return built(analyse(trace(model, image), keep, ballast))


def built(analysis: Analysis) -> fx.GraphModule:
    """The compact network of an analysis, as of `compact`."""
    small, foldings = rewrite(analysis)
    for name, attribute in dict.fromkeys(foldings):
        module = small.get_submodule(name)
        if not getattr(module, attribute).any():
            setattr(module, attribute, None)
    return small


def load(
    path: str | Path,
    model: nn.Module | None = None,
    image: tuple[int, int, int] | None = None,
) -> nn.Module:
    """The network in a `compact.pt` or `zeroed.pt`, in eval mode. Only tensors are unpickled.

    path: the file, or a run directory for its compact network;

    model: a network of the original architecture, where it is not one of fpgm's own; image: see
    compact.
    Raises CheckpointError for a file that is damaged, unsafe or something else.
    """
    path = Path(path) / "compact.pt" if Path(path).is_dir() else Path(path)
    saved = read(path, ("arch", "keep", "state_dict"))
    shapes = {name: tuple(value.shape) for name, value in saved["state_dict"].items()}
    network = structure(saved, shapes, model, image)
    try:
        network.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not a network of this architecture ({error})") from error
    return network.eval()


def structure(
    saved: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module | None = None,
    image: tuple[int, int, int] | None = None,
) -> nn.Module:
    """The network that a `compact.pt` or `zeroed.pt` describes, its weights as they start.

    saved: what such a file says, but for the state_dict, of which shapes has what each entry
    measures; the others as of load.
    """
    if model is None:
        with torch.random.fork_rng(devices=[]):  # the initialisation is thrown away
            model = build_model(**saved["arch"])
    if shapes == {name: tuple(value.shape) for name, value in model.state_dict().items()}:
        return model
    image = image or tuple(saved.get("image", ())) or None
    graph, known = trace(model, image), (saved.get("ballast"), saved.get("decided"))
    small, foldings = rewrite(analyse(graph, saved["keep"], *known))
    for name, attribute in foldings:
        # Those that were all zero were dropped before it was saved.
        ends = (f"{name}.", f".{attribute}")
        if not any(k.startswith(ends[0]) and k.endswith(ends[1]) for k in shapes):
            setattr(small.get_submodule(name), attribute, None)
    for step in saved.get("low_rank", ()):
        split(small, step["ranks"], step["way"])
    return small


@torch.inference_mode()
def equivalence(zeroed: nn.Module, small: nn.Module, images: Tensor) -> dict[str, float]:
    """How far the outputs of two networks lie apart on `images` (B, C, H, W), in eval mode: one
    tensor, (B, classes, ...), or a structure of such (see compare)."""
    with evaluating(zeroed, small), exact():
        outputs = [tree_leaves(network(images)) for network in (zeroed, small)]
    found = [compare(full, reduced) for full, reduced in zip(*outputs, strict=True)]
    worst = {key: max(one[key] for one in found) for key in ("max_abs_diff", "max_abs_logit")}
    agreement = sum(one["agreement"] for one in found) / len(found)
    return {**worst, "agreement": agreement, "images": len(images)}


def compare(full: Tensor, reduced: Tensor) -> dict[str, float]:
    """How far two networks' outputs (n, classes) lie apart; agreement: share of equal argmax."""
    return {
        "max_abs_diff": float((full - reduced).abs().max()),
        "max_abs_logit": float(full.abs().max()),
        "agreement": float((full.argmax(1) == reduced.argmax(1)).double().mean()),
        "images": len(full),
    }
