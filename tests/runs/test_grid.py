"""A sweep that was asked for is the sweep that runs, in places of its own, again and again."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import CONFIGS, compose, report, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fpgm.errors import Error
from fpgm.report import paper
from fpgm.report.collect import missing
from fpgm.runs import grid
from fpgm.runs.baseline import find_baseline
from fpgm.training.asked import asked

ROWS = [
    {"arch": ["a", "b"], "rate": 0},
    {"arch": "a", "criterion": ["gm", "l2"], "rate": [0.3, 0.4]},
    {"arch": "a", "criterion": "gm", "rate": 0.4, "pretrained": "baseline"},
]
# No null: that is what a row says of the keys that it does not have.
values = st.sampled_from(["gm", "l2", True, False, 0, 1, 2, 0.25, 0.4, 1e-5])
rows = st.lists(
    st.dictionaries(
        st.sampled_from(["arch", "criterion", "rate", "seed"]),
        st.one_of(values, st.lists(values, min_size=1, max_size=3)),
        min_size=1,
    ),
    min_size=1,
    max_size=4,
)


def test_rows_are_the_products_of_their_values_and_no_others() -> None:
    assert grid.runs(ROWS) == [
        ["arch=a", "rate=0"],
        ["arch=b", "rate=0"],
        *(["arch=a", f"criterion={c}", f"rate={r}"] for c in ("gm", "l2") for r in (0.3, 0.4)),
        ["arch=a", "criterion=gm", "rate=0.4", "pretrained=baseline"],
    ]


def test_words_of_a_row_choose_a_part_and_all_others_hold_for_every_run() -> None:
    assert grid.chosen(ROWS, ["arch=b", "epochs=3"]) == [["arch=b", "rate=0", "epochs=3"]]
    assert len(grid.chosen(ROWS, ["criterion=gm"])) == 3
    assert len(grid.chosen(ROWS, ["rate=0.40"])) == 3
    assert len(grid.chosen(ROWS, ["rate=0.4", "pretrained=null"])) == 2


def test_words_that_no_run_has_are_named_with_what_there_is() -> None:
    with pytest.raises(Error, match=r"arch=c: not in this grid, choose one of a, b$"):
        grid.chosen(ROWS, ["arch=c"])
    with pytest.raises(Error, match=r"criterion=mix: .* choose one of null, gm, l2$"):
        grid.chosen(ROWS, ["criterion=mix"])
    assert grid.chosen(ROWS, ["arch=b", "rate=0.3"]) == []


def test_jobs_that_would_share_a_directory_are_refused_before_any_starts(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name / "images").mkdir(parents=True)
    words = ("--multirun", "dataset=image_folder", "dataset.root=x/images,y/images", "epochs=1")
    status, out, err = run(tmp_path, *words)
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    assert "would share outputs/" in line
    assert "hydra.sweep.dir=" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["arch=resnet56", "rate=0.3"], "no run of this grid has these together"),
        (["arch=resnet18"], "arch=resnet18: not in this grid, choose one of resnet20, resnet32"),
    ],
)
def test_a_grid_without_such_runs_says_so_in_a_line(
    words: list[str], line: str, tmp_path: Path
) -> None:
    status, out, err = run(tmp_path, "experiment=fpgm_table1", *words)
    assert (status, out) == (1, "")
    assert line in err
    assert len(err.splitlines()) == 1


def test_two_grids_at_once_are_refused(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, "--multirun", "experiment=smoke,quick")
    assert (status, out) == (1, "")
    assert err.strip() == "experiment=a,b: one grid at a time, each in a command of its own"


def test_several_values_choose_the_runs_that_there_are(tmp_path: Path) -> None:
    words = ["experiment=fpgm_table1", "arch=resnet20,resnet56", "rate=0.3,0.4", "seed=0"]
    found = [
        job
        for a in ("resnet20", "resnet56")
        for r in (0.3, 0.4)
        for job in grid.chosen(jobs_rows("fpgm_table1"), [f"arch={a}", f"rate={r}"])
    ]
    assert len(found) == 8
    status, _, err = run(tmp_path, *words, "dataset.root=/nowhere/at/all", "device=tpu")
    assert status == 1
    assert err.count("device=tpu: choose one of") == 2 * 8  # at once, and in the list


@settings(deadline=None)
@given(rows, st.sampled_from([[], ["epochs=3"], ["dataset=digits", "+x=a/b"]]))
def test_no_two_runs_of_a_grid_share_a_directory(table: list[dict], more: list[str]) -> None:
    jobs = [[*job, "experiment=e", *more] for job in grid.runs(table)]
    places = [grid.place(job, table) for job in jobs]
    assert len(set(places)) == len(jobs)
    assert len({directory for directory, _ in places}) == 1  # and all lie in the grid's


@settings(deadline=None)
@given(rows)
def test_the_command_for_a_missing_run_makes_that_run_and_no_other(table: list[dict]) -> None:
    jobs = [[*job, "experiment=e"] for job in grid.runs(table)]
    for job in jobs:
        _, first, *words = grid.command(job, jobs).split(" ")
        assert first == "experiment=e"
        assert grid.chosen(table, words) == [job[:-1]]


def test_runs_that_start_from_a_baseline_wait_for_it() -> None:
    first, second = grid.waves(grid.runs(ROWS))
    sparse = ["rate=0", "method=slimming"], ["rate=0.4", "pretrained=baseline+slimming"]
    assert grid.waves(sparse[::-1]) == [[sparse[0]], [sparse[1]]]
    assert len(first) == 6
    assert [["pretrained=baseline" in job for job in wave] for wave in (first, second)] == [
        [False] * 6,
        [True],
    ]


def test_what_was_asked_for_before_stays_known(tmp_path: Path) -> None:
    grid.remember(tmp_path / "g", {"seed=0": ["seed=0"]})
    grid.remember(tmp_path / "g", {"seed=1": ["seed=1"]})
    assert grid.remembered(tmp_path / "g") == {"seed=0": ["seed=0"], "seed=1": ["seed=1"]}
    assert grid.remembered(tmp_path) == {}


EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def jobs_rows(experiment: str) -> list[dict]:
    content = yaml.safe_load((CONFIGS / "experiment" / f"{experiment}.yaml").read_text())
    return content.get("hydra", {}).get("sweeper", {"rows": [{}]})["rows"]


def jobs_of(experiment: str) -> list[list[str]]:
    return grid.runs(jobs_rows(experiment))


def covering(row: dict) -> list[list[str]]:
    """A few of a row's runs, in which each of its values is met."""
    lists = {key: v if isinstance(v, list) else [v] for key, v in row.items()}
    count = max(map(len, lists.values()), default=1)
    rows = [{key: [v[i % len(v)]] for key, v in lists.items()} for i in range(count)]
    return [job for one in rows for job in grid.runs([one])]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_row_of_every_experiment_is_a_valid_configuration(experiment: str) -> None:
    root = ["dataset.root=DIR"] if "imagenet" in experiment or "table2" in experiment else []
    for row in jobs_rows(experiment):
        for job in covering(row):
            asked(compose(f"experiment={experiment}", *job, *root))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_opens_with_its_command_and_its_cost(experiment: str) -> None:
    text = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    assert f"#   fpgm-train experiment={experiment}" in text
    seeds = re.search(r'seed: "([\d,]+)"', text)
    count = len(jobs_of(experiment)) * (len(seeds[1].split(",")) if seeds else 1)
    assert re.search(rf"(?m)^# Cost: {count} runs?, .* (hours|minutes) on a GPU$", text)


@pytest.mark.parametrize("arch", [18, 34, 50, 101, 152])
def test_imagenet_recipes_are_the_papers(arch: int) -> None:
    config = asked(compose(f"experiment=imagenet_resnet{arch}", "dataset.root=DIR"))
    assert (config.arch, config.epochs, config.batch_size) == (f"resnet{arch}", 100, 256)
    assert (config.optimizer.gamma, config.optimizer.weight_decay) == (0.1, 1e-4)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps' worth."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 2), ("val", 1)):
        for kind in ("a", "b"):
            (root / part / kind).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / kind / f"{i}.png")
    return root


def two_steps(tmp_path: Path, images: Path, experiment: str, job: list[str]) -> None:
    words = [*job, f"dataset.root={images}", "dataset.image_size=64", "batch_size=2", "epochs=1"]
    words.append("dataset.validation=0")  # of four images
    words.append("optimizer.milestones=[1e-9,1e-9,1e-9]")  # small steps: two images a batch
    if any("pretrained" in word for other in jobs_of(experiment) for word in other):
        words.append("pretrained=null")
    if any(word.startswith("epochs=") for other in jobs_of(experiment) for word in other):
        words.append("hydra.mode=RUN")  # its epochs are a matter of the grid: one run without it
    dataset = [] if any("imagenet" in w for w in (experiment, *job)) else ["dataset=image_folder"]
    seed = ["seed=0"] if experiment not in ALONE else []
    status, out, err = run(tmp_path, f"experiment={experiment}", *dataset, *words, *seed)
    assert status == 0, err
    assert "epoch 1/1" in out


ALONE = [name for name in EXPERIMENTS if name.startswith("imagenet")]


# The others are of the same rows: in .ci/run.
FEW = ("smoke",)


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(e, marks=[] if e in FEW else pytest.mark.slow) for e in EXPERIMENTS],
)
def test_every_experiment_runs(experiment: str, images: Path, tmp_path: Path) -> None:
    """One run of each, two steps; the last that starts from nothing."""
    jobs = [job for job in jobs_of(experiment) if not any("pretrained" in w for w in job)]
    two_steps(tmp_path, images, experiment, jobs[-1])


def test_every_row_that_the_paper_has_is_in_its_grid() -> None:
    """Counted in the paper: table 1 without the two cells that its authors call mistakes."""
    table1 = [set(job) for job in jobs_of("fpgm_table1")]
    assert sum("rate=0" in job for job in table1) == 4
    assert sum("schedule=soft" in job for job in table1) == 4
    assert sum("pretrained=baseline" in job for job in table1) == 3
    assert len(table1) == 19
    assert {"arch=resnet20", "criterion=mix", "rate=0.4"} not in table1


def test_runs_of_the_grids_are_those_that_the_papers_print() -> None:
    """Each run that has a figure in a paper is known as that row, by its recipe: none is lacking,
    and nothing in the grid departs from it."""
    for experiment, printed in {
        "fpgm_table3": ["baseline", "PFEC without fine-tuning", "PFEC 40 epochs", "PFEC 160 epochs",
                        "FPGM without fine-tuning", "FPGM 40 epochs", "FPGM 160 epochs"],
        "fpgm_table4": ["baseline", "PFEC", "FPGM, PFEC's widths", "FPGM"],
        "pfec": ["baseline", "baseline", "baseline", "PFEC 40 epochs", "PFEC-A", "PFEC-B", "PFEC-A",
                 "PFEC-B"],
    }.items():  # fmt: skip
        configs = [compose(f"experiment={experiment}", *job) for job in jobs_of(experiment)]
        rows = [paper.counterpart(config) for config in configs]
        assert [row.method for row in rows] == printed
        for row, config in zip(rows, configs, strict=True):
            assert paper.deviations(row, config, "float32") == [], (experiment, row)
    # From a trained network without the warm-up that the same network has from scratch.
    for experiment in ("fpgm_table1", "sfp_cifar"):
        tuned = [job for job in jobs_of(experiment) if "pretrained=baseline" in job]
        for config in (compose(f"experiment={experiment}", *job) for job in tuned):
            row = paper.counterpart(config)
            assert row is not None
            assert row.pretrained
            assert paper.deviations(row, config, "float32") == []


def test_a_grid_skips_what_is_done_makes_what_is_missing_and_finds_its_baselines(
    tmp_path: Path,
) -> None:
    few = ("experiment=smoke", "epochs=1", "seed=0")
    status, out, err = run(tmp_path, *few, "rate=0.4", "criterion=gm", "pretrained=baseline")
    assert status == 1  # there is none yet
    listed = {m.directory.name: m.command for m in missing([tmp_path], [])}
    command = listed["criterion=gm,rate=0.4,seed=0"].split(" ")
    assert command[0] == "fpgm-train"
    assert run(tmp_path, *command[1:])[0] == 0  # what a report says makes a missing run
    assert len(list(tmp_path.glob("outputs/*/*/report.json"))) == 1
    (line,) = {line for line in err.splitlines() if line.startswith("pretrained=baseline")}
    assert line.endswith("make it with: fpgm-train experiment=smoke seed=0 epochs=1 rate=0")
    status, out, err = run(tmp_path, *few)
    assert status == 0, err
    place = tmp_path / "outputs" / "smoke,epochs=1"
    assert "criterion=gm,rate=0.4,seed=0 is done already: " in out
    names = {path.name for path in place.iterdir() if path.is_dir()}
    tuned = "criterion=gm,optimizer=finetune_paper,pretrained=baseline,rate=0.4,seed=0"
    assert names == {
        "rate=0,seed=0", "criterion=gm,rate=0.4,seed=0", "criterion=random,rate=0.4,seed=0", tuned,
    }  # fmt: skip
    assert report(place / tuned)["config"]["pretrained"] == str(
        Path("outputs/smoke,epochs=1/rate=0,seed=0")
    )
    assert set(grid.remembered(place)) == names


def test_a_failed_run_of_a_grid_keeps_its_error_in_its_own_log(tmp_path: Path) -> None:
    words = ("experiment=smoke", "seed=0", "rate=0", "epochs=1", "dataset=image_folder",
             "dataset.root=nowhere")  # fmt: skip
    status, _, err = run(tmp_path, *words)
    assert status == 1
    (log,) = (tmp_path / "outputs").glob("smoke,*/rate=0,seed=0/train.log")
    (line,) = log.read_text().splitlines()
    assert "ERROR dataset.root=nowhere: no such directory" in line
    assert err.count("nowhere") >= 2  # at once, and in the summary


def test_a_baseline_is_the_plain_one_and_never_a_guess(tmp_path: Path) -> None:
    def config(*words: str) -> dict:
        return asked(compose("dataset=digits", *words)).as_dict()

    def finished(name: str, *words: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config(*words)))
        (tmp_path / name / "report.json").write_text("{}")
        return tmp_path / name

    own, wanted = tmp_path / "own", config("rate=0.4")
    finished("a", "rate=0", "method=slimming")
    finished("b", "rate=0", "seed=1")
    with pytest.raises(Error, match=r"no finished run at rate=0 .* fpgm-train rate=0"):
        find_baseline(own, wanted, [])
    finished("f", "rate=0", "dataset.validation=0.1")
    with pytest.raises(Error, match="no finished run at rate=0"):
        find_baseline(own, wanted, [])  # it has not seen all that this run is to train on
    short = finished("c", "rate=0", "epochs=3")
    older = config("rate=0", "epochs=3")
    del older["dataset"]["validation"]  # as when there was no such key
    (short / "config.yaml").write_text(yaml.safe_dump(older))
    assert find_baseline(own, wanted, []) == short
    same = finished("d", "rate=0")
    assert find_baseline(own, wanted, []) == same
    finished("e", "rate=0", "batch_size=32")
    with pytest.raises(Error, match=r"could be any of .*/d, .*/e; name the one"):
        find_baseline(own, wanted, [])
    own.mkdir()
    (own / "config.yaml").write_text(yaml.safe_dump({**wanted, "pretrained": str(short)}))
    assert find_baseline(own, wanted, []) == short  # it has begun with that one


def test_a_baseline_with_a_method_is_the_one_that_was_trained_with_it(tmp_path: Path) -> None:
    def finished(name: str, *words: str) -> Path:
        (tmp_path / name).mkdir()
        values = asked(compose("dataset=digits", *words)).as_dict()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(values))
        (tmp_path / name / "report.json").write_text("{}")
        return tmp_path / name

    wanted = compose("dataset=digits", "rate=0.4", "pretrained=baseline+slimming")
    words = [
        "dataset=digits",
        "rate=0.4",
        "scope=global",
        "layers=x",
        "pretrained=baseline+slimming",
    ]
    finished("plain", "rate=0")
    finished("by_rates", "arch=resnet20", "rate=0", "method=slimming", "rates={conv1:0.3}")
    with pytest.raises(Error) as caught:
        find_baseline(tmp_path / "own", wanted, words)
    assert str(caught.value).startswith("pretrained=baseline+slimming: no finished run at rate=0")
    assert str(caught.value).endswith("fpgm-train dataset=digits method=slimming rate=0")
    sparse = finished("sparse", "rate=0", "method=slimming", "method.slimming.strength=0.01")
    assert find_baseline(tmp_path / "own", wanted, words) == sparse
