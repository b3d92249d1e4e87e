"""experiment=methods and criteria: every row runs, ships an equal network, meets its budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from commands import CONFIGS
from tasks import few, whole

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.methods import METHODS
from fpgm.runs import grid

__all__ = ["few"]  # a fixture

ROWS = [
    row
    for name in ("methods", "criteria")
    for row in yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())["hydra"][
        "sweeper"
    ]["rows"]
]
# Rows differ in their epochs: two are enough here.
JOBS = list(
    dict.fromkeys(
        tuple(word for word in job if not word.startswith(("epochs=", "pretrained=")))
        for job in grid.runs(ROWS)
    )
)


def test_no_criterion_and_no_schedule_of_a_way_of_its_own_is_left_out() -> None:
    words = {word for job in JOBS for word in job}
    left = {name for name in CRITERIA if f"criterion={name}" not in words}
    assert left == {"lp"}  # a family of which l1, l2 are there
    schedules = [n for n in METHODS if (CONFIGS / "schedule" / f"{n}.yaml").exists()]
    left = {name for name in schedules if f"schedule={name}" not in words}
    assert left == {"frozen", "soft", "asymptotic"}  # of frozen and soft there are whole tables


@pytest.mark.slow
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: ",".join(job)[:60])
def test_each_row_runs_two_epochs_and_ships_an_equal_network(
    job: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = fpgm.model("resnet20", in_channels=1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    batches = ["criterion.batches=1"] if _reads_images(job) else []
    sparse = "rate=0" in job
    start = [] if sparse else [f"pretrained={tmp_path}/w.pt"]
    report = whole(tmp_path / "r", *job, *start, *batches)
    same = report["equivalence"]
    assert same["max_abs_diff"] <= 1e-5 * same["max_abs_logit"]
    if not sparse:
        assert report["compact"]["macs"] <= 0.5 * report["dense"]["macs"]


def _reads_images(job: tuple[str, ...]) -> bool:
    named = next((w.partition("=")[2] for w in job if w.startswith("criterion=")), "gm")
    return CRITERIA[named].reads_images
