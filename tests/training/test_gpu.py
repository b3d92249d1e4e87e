"""On a GPU every tensor is where the others are, and no step makes the host wait."""

from __future__ import annotations

from pathlib import Path

import emulated_gpu
import pytest
import torch
from commands import compose
from emulated_gpu import OnGpu, emulate, to_cpu, waits
from tasks import few
from torch.utils._pytree import tree_map

import fpgm.training.loop
from fpgm.runs import checkpoint
from fpgm.runs.run import Run
from fpgm.training.asked import asked
from fpgm.training.finish import finish
from fpgm.training.task import Task, prepare

__all__ = ["few"]  # a fixture


def test_the_emulation_sees_what_a_gpu_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulate(monkeypatch):
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert (there.device.type, (2 * there).device.type, here.device.type) == (
            "cuda", "cuda", "cpu",
        )  # fmt: skip
        with pytest.raises(AssertionError, match="tensors of both devices"):
            here + there
        with pytest.raises(AssertionError, match="into a tensor on the CPU"):
            here[torch.tensor([0], device="cuda")]
        with pytest.raises(AssertionError, match="numpy"):
            there.numpy()
        module = torch.nn.Linear(3, 3).to("cuda")
        assert module(there).is_cuda
        with pytest.raises(AssertionError, match="tensors of both devices"):
            module(here)
        assert not waits
        assert there.sum().item() == 3
        there[there > 2].sum()
        assert waits == {"item": 1, "mask": 1}


@pytest.mark.parametrize(
    "words",
    [
        "criterion=gm rate=0.5 residual=shared align=16",  # trains the compact network
        "criterion=taylor rate=0.4 scope=global schedule=soft",
        "criterion=hrank macs_target=0.6 residual=inner schedule=asymptotic method=slimming",
        "criterion=whc rate=0.4 schedule=gated optimizer=fast",
    ],
)
def test_a_run_from_start_to_report_keeps_to_the_gpu(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: None
) -> None:
    step = fpgm.training.loop.step

    def watched(*arguments):
        before = waits.copy()
        loss = step(*arguments)
        assert waits == before, "a step made the host wait"
        return loss

    monkeypatch.setattr(fpgm.training.loop, "step", watched)
    given = ["dataset=digits", "batch_size=48", "epochs=2", "precision=float32", "device=cuda"]
    config = asked(compose(*given, *words.split()))

    def task() -> Task:
        made = prepare(config, tmp_path)
        assert made.device == emulated_gpu.GPU
        assert all(isinstance(parameter, OnGpu) for parameter in made.full.network.parameters())
        return made

    with emulate(monkeypatch), Run(tmp_path, config.as_dict()) as run:
        first = task()
        first.history.append(fpgm.training.loop.one_epoch(first, 0))
        # As torch.load(map_location="cpu") gives it back.
        checkpoint.save_epoch(tmp_path, tree_map(to_cpu, first.state()))
        second = task()
        assert len(second.history) == 1
        second.history.append(fpgm.training.loop.one_epoch(second, 1))
        report = finish(second, run)
    assert report["status"] == "done"
    assert report["equivalence"]["images"] == 40
