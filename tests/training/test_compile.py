"""compile=true: the same training, and nothing compiled again once every shape has been seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_compacted import in_float64, is_compact, task_of
from torch._dynamo.utils import counters

from fpgm.training.loop import one_epoch

WORDS = ("epochs=3", "batch_size=500", "rate=0.5", "residual=shared", "align=8")


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "full width"])
def test_compiled_training_is_the_same_and_compiles_in_the_first_epoch_alone(
    tmp_path: Path, compact: bool
) -> None:
    rows, graphs = {}, []
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        counters.clear()
        # In float64, that rounding is not amplified into another history.
        task = task_of(tmp_path, compact, *WORDS, f"compile={compiled}")
        in_float64(task)
        rows[compiled] = []
        for epoch in range(3):
            rows[compiled].append(one_epoch(task, epoch))
            graphs.append(compiled_graphs())
        assert is_compact(task) == compact
    # Batches of 500; neither the last one of 437 nor further epochs nor evaluations add any.
    assert graphs == [0, 0, 0, 1, 1, 1]
    assert not counters["graph_break"]
    for ours, theirs in zip(rows["true"], rows["false"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        for key in ("accuracy_before", "accuracy_after"):
            assert ours[key] == pytest.approx(theirs[key], abs=100 / 360)  # one image
        for key in ("churn", "revived", "dead", "pruned"):
            assert ours[key] == theirs[key], key
