"""On a GPU every tensor is where the others are, and no step makes the host wait."""

from __future__ import annotations

from pathlib import Path

import emulated_gpu
import pytest
import torch
from commands import compose
from emulated_gpu import OnGpu, emulate, waits

import fpgm.training.loop
from fpgm.config import Config
from fpgm.runs import checkpoint
from fpgm.training.finish import deliver
from fpgm.training.task import Job, load_images, prepare


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
        "criterion=gm rate=0.4",
        "criterion=l2 macs_target=0.5 residual=inner schedule=soft",
        "criterion=gm rate=0.5 residual=shared align=16",  # trains the compact network
        "criterion=taylor rate=0.4 scope=global schedule=soft",
        "criterion=hrank rate=0.4 criterion.batches=1",
        "criterion=bn_gamma rate=0.4 criterion.slimming=1e-4 schedule=asymptotic",
    ],
)
def test_a_run_from_start_to_report_keeps_to_the_gpu(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = fpgm.training.loop._step

    def watched(*arguments):
        before = waits.copy()
        loss = step(*arguments)
        assert waits == before, "a step made the host wait"
        return loss

    monkeypatch.setattr(fpgm.training.loop, "_step", watched)
    given = ["dataset=digits", "batch_size=500", "epochs=2", "precision=float32", "device=cuda"]
    config = Config.of(compose(*given, *words.split()))

    def job(fresh: bool) -> Job:
        made = prepare(config, tmp_path, load_images(config), fresh)
        assert made.device == emulated_gpu.GPU
        assert all(isinstance(parameter, OnGpu) for parameter in made.model.parameters())
        return made

    with emulate(monkeypatch):
        first = job(fresh=True)
        history = fpgm.training.loop.resume(first, None)
        history.append(fpgm.training.loop.one_epoch(first, 0))
        reached = {
            "model": first.model.state_dict(), "optimizer": first.optimizer.state_dict(),
            "keep": first.pruning.keep, "rate": first.pruning.full_rate(),
            "scores": first.pruning.finite_scores(), "history": history,
        }  # fmt: skip
        checkpoint.save_epoch(tmp_path, reached)
        second = job(fresh=False)
        history = fpgm.training.loop.resume(second, checkpoint.restore_epoch(tmp_path)[0])
        history.append(fpgm.training.loop.one_epoch(second, 1))
        report = deliver(second, history, config.as_dict())
    assert report["status"] == "done"
    assert report["equivalence"]["images"] == 360
