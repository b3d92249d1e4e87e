"""Sweeps through Hydra's launchers: side by side here, or handed to a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import numbers, report, run_apart


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("hydra_plugins.hydra_joblib_launcher",
         ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_plugins.hydra_submitit_launcher",
         ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]),
    ],
    ids=["joblib", "submitit"],
)  # fmt: skip
def test_jobs_run_elsewhere_and_their_failures_come_back(
    module: str, words: list[str], tmp_path: Path
) -> None:
    pytest.importorskip(module)
    sweep = ["dataset=digits", "epochs=1", "arch=resnet20", "rate=0.3,0.4,1.5"]
    status, out, err = run_apart(tmp_path, "--multirun", *sweep, *words)
    assert status == 1
    assert "rate=1.5: must be at least 0 and below 1" in out + err
    for rate in ("0.3", "0.4"):
        directory = tmp_path / "outputs" / f"arch=resnet20,dataset=digits,epochs=1,rate={rate}"
        assert report(directory)["status"] == "done"
    assert "failed:\n  outputs/arch=resnet20,dataset=digits,epochs=1,rate=1.5: rate=1.5: " in err
    status, out, err = run_apart(
        tmp_path, "--multirun", *[w.replace(",1.5", "") for w in sweep], *words
    )
    assert status == 0, err


def test_a_grid_side_by_side_gives_what_it_gives_in_sequence(tmp_path: Path) -> None:
    """Baselines first, too. One thread each: sums over another number differ in the last bits."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["experiment=smoke", "seed=0", "epochs=1"]
    found = []
    for name, more in (("one", []), ("two", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])):
        where = tmp_path / name
        where.mkdir()
        status, _, err = run_apart(where, *words, *more, OMP_NUM_THREADS="1")
        assert status == 0, err
        runs = sorted((where / "outputs" / "smoke,epochs=1").glob("*/report.json"))
        assert len(runs) == 4
        found.append({path.parent.name: numbers(path.parent) for path in runs})
    assert found[0] == found[1]
