"""The installed command, as a user runs it: on images, killed, interrupted, and given nonsense."""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from commands import FPGM_TRAIN, numbers, report, run, start, wait_for

import fpgm
from fpgm.cli import overview

DIGITS = ("dataset=digits", "criterion=gm", "rate=0.4")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the README's run on the digits."""
    where = tmp_path_factory.mktemp("digits")
    status, _, err = run(where, *DIGITS)
    assert status == 0, err
    return where / "outputs" / "criterion=gm,dataset=digits,rate=0.4"


def test_main_job_on_digits_is_above_95_percent(done: Path) -> None:
    r = report(done)
    assert r["status"] == "done"
    assert r["accuracy"]["compact_last"] > 95
    assert r["accuracy"]["compact_last"] == r["accuracy"]["zeroed_last"]
    assert r["equivalence"]["images"] == 360
    assert r["equivalence"]["agreement"] == 1
    assert r["equivalence"]["max_abs_diff"] <= 1e-5 * r["equivalence"]["max_abs_logit"]
    assert set(r["pruning"]["churn"]) == {0.0}
    assert r["reduction"]["paper_macs"] == pytest.approx(54, abs=0.5)
    assert r["compact"]["macs"] < 0.48 * r["dense"]["macs"]
    assert r["compact"]["bytes"] == (done / "compact.pt").stat().st_size
    assert sum(layer["macs_compact"] for layer in r["layers"]) == r["compact"]["macs"]
    assert r["warnings"] == []


def test_run_directory_holds_all_that_is_promised(done: Path) -> None:
    names = {path.name for path in done.iterdir()}
    promised = {"config.yaml", "train.log", "history.csv", "last.pt", "zeroed.pt", "compact.pt",
                "report.json", "report.md"}  # fmt: skip
    assert promised <= names
    assert any(name.startswith("events.out.tfevents.") for name in names)
    with (done / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    for column in ("epoch", "lr", "train_loss", "accuracy_before", "accuracy_after", "churn",
                   "revived", "dead", "seconds"):  # fmt: skip
        assert rows[-1][column] != ""
    for name in ("zeroed.pt", "compact.pt"):
        content = torch.load(done / name, weights_only=True)
        assert {"arch", "keep", "state_dict"} <= set(content)


def test_compact_network_loads_in_a_few_words_and_is_as_good(done: Path) -> None:
    from fpgm.data.sets import load

    network = fpgm.load(done)
    digits = load(torch.device("cpu"), name="digits")
    images, labels = next(digits.tests(360))
    accuracy = 100 * (network(images).argmax(1) == labels).double().mean().item()
    assert accuracy == report(done)["accuracy"]["compact_last"]
    assert fpgm.cost(network, (1, 8, 8)).macs == report(done)["compact"]["macs"]


def test_same_command_again_prints_the_result(done: Path) -> None:
    before = (done / "report.json").stat().st_mtime_ns
    status, out, _ = run(done.parent.parent, *reversed(DIGITS))
    assert status == 0
    assert "is done already" in out
    assert "compact.pt" in out
    assert (done / "report.json").stat().st_mtime_ns == before


def test_result_of_a_run_that_is_done_comes_without_torch(done: Path) -> None:
    code = "import sys, fpgm.cli.command as c; c.main(); print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, *DIGITS]
    out = subprocess.run(words, cwd=done.parent.parent, capture_output=True, text=True, check=True)
    assert "is done already" in out.stdout
    assert out.stdout.splitlines()[-1] == "False"


def test_tensorboard_has_every_epoch_of_every_column(done: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(done)).Reload()
    for tag in (
        "accuracy_before",
        "accuracy_after",
        "train_loss",
        "lr",
        "churn",
        "revived",
        "dead",
    ):
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 21))


def test_tensorboard_shows_the_scores_that_filters_were_chosen_by(done: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(done), size_guidance={"histograms": 0}).Reload()
    histograms = events.Histograms("score/layer1.0.conv1")
    assert [event.step for event in histograms] == list(range(1, 21))
    assert all(event.histogram_value.num == 16 for event in histograms)


def test_tensorboard_compares_the_runs_of_a_sweep(done: Path) -> None:
    """In its HParams table: what was asked and what came out, of the run itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(done)).Reload()
    (top1,) = events.Scalars("result/compact_top1")
    assert top1.value == pytest.approx(report(done)["accuracy"]["compact_last"])
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    asked = HParamsPluginData.FromString(data).session_start_info.hparams
    assert asked["rate"].number_value == 0.4
    assert asked["criterion.name"].string_value == "gm"


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    words = (*DIGITS, "epochs=6")
    assert run(tmp_path, *words, "hydra.run.dir=whole")[0] == 0
    history = tmp_path / "cut" / "history.csv"

    def epochs() -> int:
        return len(history.read_text().splitlines()) - 1 if history.exists() else 0

    moments = random.Random(0)
    for target in sorted(moments.sample(range(5), 3)):
        process = start(tmp_path, *words, "hydra.run.dir=cut")
        wait_for(lambda target=target: epochs() >= target, process)
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    status, out, err = run(tmp_path, *words, "hydra.run.dir=cut")
    assert status == 0, err
    assert "resuming after epoch" in out
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    with history.open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(e) for e in range(1, 7)]


def test_ctrl_c_stops_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    words = (*DIGITS, "epochs=4", "hydra.run.dir=r")
    process = start(tmp_path, *words)
    wait_for(lambda: (tmp_path / "r" / "last.pt").exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err
    status, out, err = run(tmp_path, *words)
    assert status == 0, err
    assert "resuming after epoch" in out


def test_truncated_checkpoint_costs_one_epoch_and_is_said(tmp_path: Path) -> None:
    words = (*DIGITS, "epochs=3", "hydra.run.dir=r")
    assert run(tmp_path, *words)[0] == 0
    expected = numbers(tmp_path / "r")
    (tmp_path / "r" / "report.json").unlink()
    last = tmp_path / "r" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    status, out, err = run(tmp_path, *words)
    assert status == 0, err
    assert "truncated or damaged" in out
    assert "resuming after epoch 2 of 3" in out
    assert numbers(tmp_path / "r") == expected


@pytest.mark.slow
def test_soft_run_that_settles_and_recalibrates_resumes_with_the_same_numbers(
    tmp_path: Path,
) -> None:
    words = ("dataset=digits", "criterion=mix", "schedule=asymptotic", "schedule.settle=0.6",
             "schedule.recalibrate=5", "epochs=5", "macs_target=0.6")  # fmt: skip
    assert run(tmp_path, *words, "hydra.run.dir=whole")[0] == 0
    for epochs in (1, 4):
        process = start(tmp_path, *words, "hydra.run.dir=cut")
        history = tmp_path / "cut" / "history.csv"
        wait_for(
            lambda history=history, epochs=epochs: (
                history.exists() and len(history.read_text().splitlines()) > epochs
            ),
            process,
        )
        process.kill()
        process.communicate()
    status, _, err = run(tmp_path, *words, "hydra.run.dir=cut")
    assert status == 0, err
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert report(tmp_path / "cut")["reduction"]["macs"] >= 40


def test_pretrained_weights_are_needed_only_to_start(tmp_path: Path) -> None:
    torch.save(fpgm.model("resnet20", in_channels=1).state_dict(), tmp_path / "w.pt")
    words = (*DIGITS, "epochs=3", "pretrained=w.pt", "hydra.run.dir=r")
    process = start(tmp_path, *words)
    wait_for(lambda: (tmp_path / "r" / "last.pt").exists(), process)
    process.kill()
    process.communicate()
    (tmp_path / "w.pt").unlink()
    status, _, err = run(tmp_path, *words)
    assert status == 0, err


def test_failed_start_does_not_stand_in_the_way_of_the_corrected_command(tmp_path: Path) -> None:
    assert run(tmp_path, *ONE, "arch=resnet18")[0] == 1
    assert not (tmp_path / "r").exists()
    status, _, err = run(tmp_path, *ONE)
    assert status == 0, err


def test_diverged_last_step_is_not_kept_as_a_good_epoch(tmp_path: Path) -> None:
    words = (*DIGITS, "optimizer.lr=3e38", "batch_size=1437", "hydra.run.dir=r")
    status, _, err = run(tmp_path, *words)
    assert status == 1
    assert "the loss is not finite at epoch 1" in err
    assert not (tmp_path / "r" / "last.pt").exists()


def test_soft_says_in_one_line_what_the_last_zeroing_cost(tmp_path: Path) -> None:
    words = ("dataset=digits", "criterion=l2", "schedule=soft", "epochs=4", "hydra.run.dir=r")
    status, out, err = run(tmp_path, *words)
    assert status == 0, err
    r = report(tmp_path / "r")
    assert r["pruning"]["revived"][-1] > 0
    cost = r["accuracy"]["dense"] - r["accuracy"]["zeroed_last"]
    assert cost > 5
    (warning,) = [line for line in out.splitlines() if line.startswith("warning:")]
    assert f"cost {cost:.1f} points" in warning
    assert "schedule=frozen" in warning
    assert r["accuracy"]["compact_last"] == r["accuracy"]["zeroed_last"]


def test_sweep_runs_every_job_in_its_own_directory_and_one_failure_stops_no_other(
    tmp_path: Path,
) -> None:
    words = ("--multirun", "dataset=digits", "epochs=1", "criterion=l2,mix", "rate=7,0.3")
    status, out, err = run(tmp_path, *words)
    assert status == 1
    assert err.count("rate=7: must be at least 0 and below 1") == 4  # at once, and in the summary
    for criterion in ("l2", "mix"):
        assert out.count(f"digits (1437 + 360 images of 1x8x8, 10 classes), {criterion}, ") == 1
        name = f"criterion={criterion},dataset=digits,epochs=1,rate="
        assert "epoch 1/1" in (tmp_path / "outputs" / f"{name}0.3" / "train.log").read_text()
        assert report(tmp_path / "outputs" / f"{name}0.3")["status"] == "done"
        log = (tmp_path / "outputs" / f"{name}7" / "train.log").read_text()
        assert log.startswith("ERROR rate=7: must be at least 0 and below 1")


def test_interrupted_sweep_lists_what_had_failed(tmp_path: Path) -> None:
    words = ("--multirun", "dataset=digits", "epochs=50", "rate=7,0.3")
    process = start(tmp_path, *words)
    runs = tmp_path / "outputs"
    wait_for(lambda: any(runs.glob("*/last.pt")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("rate=7: must be at least 0 and below 1") == 2


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place nobody may write to")
def test_failed_jobs_are_reported_where_the_current_directory_cannot_be_written(
    tmp_path: Path,
) -> None:
    words = ("dataset=digits", "epochs=1")
    status, _, err = run(Path("/proc"), *words, "rate=7", f"hydra.run.dir={tmp_path}/r")
    assert status == 1
    assert err.strip() == "rate=7: must be at least 0 and below 1, for example rate=0.4"
    sweep = ("rate=7,0.3", f"hydra.sweep.dir={tmp_path}")
    status, _, err = run(Path("/proc"), "--multirun", *words, *sweep)
    assert status == 1
    assert err.count("rate=7: must be at least 0 and below 1") == 2
    assert len([*tmp_path.rglob("report.json")]) == 1  # the other job has run


def test_pretrained_run_is_pruned_hard_and_stays_good(done: Path, tmp_path: Path) -> None:
    base = ("dataset=digits", "rate=0", "epochs=8", "hydra.run.dir=base")
    assert run(tmp_path, *base)[0] == 0
    words = ("dataset=digits", "schedule=hard", "optimizer=finetune", "pretrained=base",
             "epochs=4", "hydra.run.dir=r")  # fmt: skip
    status, _, err = run(tmp_path, *words)
    assert status == 0, err
    r = report(tmp_path / "r")
    assert r["accuracy"]["compact_last"] > 90
    assert set(r["pruning"]["churn"]) == {0.0}
    assert report(tmp_path / "base")["pruning"]["pruned_filters"] == 0


def test_recalibration_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    words = ("dataset=digits", "schedule=soft", "epochs=3", "schedule.recalibrate=20")
    status, _, err = run(tmp_path, *words, "hydra.run.dir=r")
    assert status == 0, err
    accuracy = report(tmp_path / "r")["accuracy"]
    with (tmp_path / "r" / "history.csv").open() as file:
        before = float(list(csv.DictReader(file))[-1]["accuracy_after"])
    assert accuracy["zeroed_last"] != before
    assert accuracy["compact_last"] == accuracy["zeroed_last"]


ONE = (*DIGITS, "epochs=1", "hydra.run.dir=r")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rate=1.5",), "rate=1.5: must be at least 0 and below 1, for example rate=0.4"),
        (("rate=-0.1",), "rate=-0.1: must be at least 0"),
        (("rate=abc",), "rate=abc: must be a number"),
        (("rate=[",), "rate=[: not understood"),
        (("criterion=foo",), "criterion=foo: choose one of apoz, bn_beta, bn_gamma, chip, cpmc"),
        (("arch=foo",), "arch=foo: choose one of compact, densenet40, lenet5, own, preresnet110"),
        (("preset=bst",), "preset=bst: choose one of best, paper"),
        (("layers=foo",), "layers=foo: choose one of pfec_resnet110_a, pfec_resnet110_b"),
        (
            ("preset=best", "pretrained=x", "align=1"),
            "align=1: preset=best says align=8; leave one of them out",
        ),
        (("ratte=0.4",), "ratte: no such key, did you mean rate?"),
        (("optimizer.lrr=1",), "optimizer.lrr: no such key, did you mean optimizer.lr?"),
        (("+extra=1",), "extra: no such key"),
        ((*ONE, "rate=0.999999999999"), "would prune all 16 filters of conv1"),
        ((*ONE, "device=cuda"), "device=cuda: torch sees no GPU here"),
        ((*ONE, "arch=resnet18"), "arch=resnet18 takes images of 3 channels, not 1"),
        ((*ONE, "arch=vgg16"), "arch=vgg16: images of 8x8 are too small for it"),
        ((*ONE, "arch=lenet5"), "arch=lenet5 takes images of 28x28, not 8x8: try dataset=mnist"),
        ((*ONE, "criterion=lp", "criterion.p=.5"), "criterion.p=0.5: must be at least 1"),
        ((*ONE, "criterion=l1", "criterion.distance=l2"), "the chosen criterion has no such key"),
        ((*ONE, "rate=${x}"), "Interpolation key 'x' not found"),
        ((*ONE, "macs_target=0.001", "align=8"), "macs_target=0.001: not to be reached"),
        ((*ONE, "pretrained=nowhere"), "pretrained=nowhere: no such file"),
        ((*ONE, "schedule=hard"), "schedule=hard: prunes a trained network"),
        ((*ONE, "hydra.run.dir=file/r"), "file/r: Not a directory; choose another place"),
        (("dataset=image_folder",), "dataset.root=null"),
        (
            ("dataset=image_folder", "dataset.root=nowhere"),
            "dataset.root=nowhere: no such directory",
        ),
        (("dataset=cifar10", "dataset.root=file"), "or try dataset=digits, which needs no network"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[-1:]),
)
def test_bad_input_gets_one_clear_line(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "file").touch()
    status, _, err = run(tmp_path, *words)
    assert status == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_loss_that_is_not_finite_stops_at_that_step_and_keeps_what_was(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, *DIGITS, "optimizer.lr=1e9", "hydra.run.dir=r")
    assert status == 1
    assert "the loss is not finite at epoch 1, step " in err
    assert "optimizer.lr=1e+08" in err
    assert not (tmp_path / "r" / "last.pt").exists()


@pytest.mark.parametrize(
    ("size", "cure"),
    [(64, "try batch_size=32 in a new directory"), (1, "it needs a GPU with more")],
)
def test_full_gpu_memory_gets_a_line_with_the_batch_size_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, cure: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", full)
    status, _, err = run(tmp_path, *DIGITS, f"batch_size={size}", "hydra.run.dir=r")
    assert status == 1
    assert err.strip() == f"batch_size={size}: does not fit into the GPU's memory; {cure}"


def test_other_configuration_and_other_network_are_refused(done: Path, tmp_path: Path) -> None:
    where = done.parent.parent
    status, _, err = run(where, *DIGITS, "seed=1", f"hydra.run.dir={done}")
    assert status == 1
    assert "seed: 0 -> 1" in err
    status, _, err = run(tmp_path, *ONE, "arch=resnet32", f"pretrained={done}")
    assert status == 1
    assert "another network" in err
    assert "layer1.3.conv1.weight" in err


def test_alignment_that_leaves_nothing_to_prune_is_said(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, *ONE, "align=64")
    assert status == 0, err
    assert "warning: nothing is pruned: align=64 is too coarse here" in out


def test_budget_says_the_rate_that_it_found(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, *ONE, "macs_target=0.5", "residual=shared")
    assert status == 0, err
    assert "macs_target 0.5 (rate 0." in out
    assert 50 <= report(tmp_path / "r")["reduction"]["macs"] < 60


def test_version_is_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = f"fpgm {version('fpgm')}\n"
    assert run(tmp_path, "--version")[1] == ours
    with pytest.raises(SystemExit):
        overview.main(["--version"])
    assert capsys.readouterr().out == ours


def test_fpgm_lists_the_commands_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    overview.main([])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    project = (Path(fpgm.__file__).parent.parent / "pyproject.toml").read_text()
    scripts = re.findall(r'(?m)^(fpgm-\w+) = "', project)
    assert sorted(listed) == sorted(scripts)


def test_traceback_comes_back_when_asked_for(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, *ONE, "arch=resnet18", HYDRA_FULL_ERROR="1")
    assert status == 1
    assert "Traceback" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_full_disk_stops_with_a_line_and_the_run_goes_on_after_space_is_made(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mount is not allowed here")
    try:
        words = (*DIGITS, "epochs=3", f"hydra.run.dir={disk}/r")
        (disk / "filler").write_bytes(bytes(1_500_000))  # one checkpoint of 2 MB fits, no second
        status, _, err = run(tmp_path, *words)
        assert status == 1
        assert "No space left on device; free some space" in err
        assert "Traceback" not in err
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        status, out, err = run(tmp_path, *words)
        assert status == 0, err
        assert "resuming after epoch" in out
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("words", [("--help",), ("-sc", "query=bash")], ids=["help", "completion"])
def test_help_and_completion_answer_in_half_a_second(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    seconds, hydras = [], []
    for _ in range(3):
        began = time.perf_counter()
        process = start(tmp_path, *words, COMP_LINE="fpgm-train criterion=")
        out, err = process.communicate()
        seconds.append(time.perf_counter() - began)
        assert process.returncode == 0, err
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import hydra.main, omegaconf"], check=True)
        hydras.append(time.perf_counter() - began)
    assert "criterion=gm" in out
    # A slow or busy machine is told by Hydra alone, of which help takes three and a half times.
    assert sorted(seconds)[1] < max(0.5, 5 * sorted(hydras)[1])


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("residual=", "residual=independent residual=inner residual=shared"),
        ("rate=0.4 residual=in", "residual=independent residual=inner"),
        ("dataset.flip=", "dataset.flip=false dataset.flip=true"),
        (
            "tune=true target=torch,o",
            "target=torch,onnxruntime target=torch,onnxruntime_int8 "
            "target=torch,openvino target=torch,openvino_int8",
        ),
        ("dataset=cif", "dataset=cifar10 dataset=cifar100"),
        ("optimizer.warm", "optimizer.warmup_epochs="),
    ],
)
def test_bash_completes_the_choices_of_groups_and_keys(
    tmp_path: Path, line: str, offered: str
) -> None:
    """With the function that `fpgm-train -sc install=bash` defines."""
    bash = f"""
PATH={Path(FPGM_TRAIN).parent}:$PATH
eval "$(fpgm-train -sc install=bash)"
COMP_LINE="fpgm-train {line}" COMP_WORDS=(fpgm-train {line}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))
COMP_POINT=${{#COMP_LINE}}
hydra_bash_completion
printf '%s\n' "${{COMPREPLY[@]}}" | sort
"""
    out = subprocess.run(["bash", "-c", bash], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.split() == offered.split()


def test_nothing_heavy_is_imported_for_help() -> None:
    modules = "sys, fpgm, fpgm.cli.command, fpgm.training.result, fpgm.runs.run"
    code = f"import {modules}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
