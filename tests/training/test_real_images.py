"""The promises on real photographs: minutes to an hour, and images that are not shipped.

    FPGM_IMAGES=DIR pytest -m slow

DIR holds CIFAR-10 as files, train/CLASS/* and test/CLASS/*.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

IMAGES = os.environ.get("FPGM_IMAGES")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not IMAGES, reason="FPGM_IMAGES=DIR names no images"),
]


def trained(where: Path, *words: str) -> dict:
    command = Path(sysconfig.get_path("scripts")) / "fpgm-train"
    data = ("dataset=image_folder", f"dataset.root={Path(IMAGES).resolve()}", "arch=resnet20")
    subprocess.run([command, *data, *words, "hydra.run.dir=r"], cwd=where, check=True)
    return json.loads((where / "r" / "report.json").read_text())


def exact(report: dict) -> bool:
    same = report["equivalence"]
    return (
        same["max_abs_diff"] <= 1e-5 * same["max_abs_logit"]
        and same["agreement"] == 1
        and report["accuracy"]["compact_last"] == report["accuracy"]["zeroed_last"]
    )


def test_default_run_stays_within_three_points_of_the_baseline(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    baseline = trained(tmp_path / "a", "rate=0", "epochs=5")
    gm = trained(tmp_path / "b", "criterion=gm", "rate=0.4", "epochs=5")
    assert gm["accuracy"]["compact_last"] > baseline["accuracy"]["compact_last"] - 3
    assert exact(gm)


@pytest.mark.parametrize(
    "words",
    [("criterion=l2", "schedule=soft"), ("criterion=gm", "schedule=frozen")],
    ids=["soft l2", "frozen gm"],
)
def test_compact_equals_zeroed_on_every_test_image(tmp_path: Path, words: tuple[str, ...]) -> None:
    report = trained(tmp_path, *words, "rate=0.4", "epochs=3")
    assert exact(report)
    assert (report["pruning"]["revived"][-1] > 0) == ("schedule=soft" in words)
