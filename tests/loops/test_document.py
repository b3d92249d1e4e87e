"""docs/loop.md runs as it stands, block by block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import fpgm

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "loop.md"


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = fpgm.model("resnet20")

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore")
def test_every_block_of_the_document_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    noise = [(torch.randn(2, 3, 32, 32), torch.randint(10, (2,))) for _ in range(2)]
    names: dict[str, Any] = {
        "batches": DataLoader(noise, batch_size=None),  # type: ignore[arg-type]
        "accelerate": accelerate, "lightning": lightning, "module": Module(),
    }  # fmt: skip
    text = DOCUMENT.read_text()
    printed = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(DOCUMENT), "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(printed) == 5
    shown = re.findall(r"\n\n```\n(.*?)```", text, re.DOTALL)[0].splitlines()
    lines = printed[0].splitlines()
    assert lines[0] == shown[0]
    for line, theirs in zip(lines, shown, strict=True):  # which filters go, the images decide
        assert re.split(r" ?(?:->|on \d)", line)[0] == re.split(r" ?(?:->|on \d)", theirs)[0]
    assert printed[2] == "3 epochs are done\n"
    assert sum(names["report"].kept.values()) < sum(names["report"].filters.values())
