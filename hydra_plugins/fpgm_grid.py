"""Hydra's sweeper, with the rows of an experiment (runs.grid) in place of one product of lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, ListConfig, OmegaConf

from fpgm.errors import Error
from fpgm.machine import processes
from fpgm.runs import grid


class Grid(BasicSweeper):
    """params: words that the command line may replace, `{seed: "0,1,2"}`; rows: see runs.grid."""

    def __init__(self, params: dict[str, str] | None = None, rows: Any = None) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.rows = OmegaConf.to_container(rows) if isinstance(rows, ListConfig) else rows

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        words = parser.parse_overrides([*self._parse_config(), *arguments])
        (combinations,) = self.split_arguments(words, None)
        jobs = combinations
        if self.rows:
            jobs = [job for asked in combinations for job in grid.chosen(self.rows, asked)]
            if not jobs:
                given = " ".join(arguments)
                raise Error(f"{given}: no run of this grid has these together")
            self._remember(combinations)
        waves = grid.waves(jobs)
        jobs = [job for wave in waves for job in wave]
        composed = [self._composed(job).hydra for job in jobs]
        if not self.rows and any(one.sweeper.get("rows") for one in composed):
            raise Error("experiment=a,b: one grid at a time, each in a command of its own")
        grid.check_places(jobs, [f"{one.sweep.dir}/{one.sweep.subdir}" for one in composed])
        # The launcher makes this directory before those of the jobs: never one of another grid.
        self.config.hydra.sweep.dir = composed[0].sweep.dir
        self._launch(waves)

    def _launch(self, waves: Sequence[Sequence[grid.Words]]) -> None:
        """Run all jobs, whichever fail. Raises FailedRunsError, or KeyboardInterrupt that names
        what had failed until then."""
        assert self.launcher is not None
        if isinstance(self.launcher, BasicLauncher):
            # One after the other in any case: so an interrupt finds the results of those before.
            waves = [[job] for wave in waves for job in wave]
        failures: list[str] = []
        count = 0
        try:
            for wave in waves:
                results = self.launcher.launch(wave, initial_job_idx=count)
                # Not return_value, which raises.
                failures += [
                    str(r._return_value) for r in results if r.status is not JobStatus.COMPLETED
                ]
                count += len(wave)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*failures) from None
        if failures:
            raise grid.FailedRunsError(*failures)

    def _composed(self, job: Sequence[str]) -> DictConfig:
        """A job's configuration. Raises Hydra's errors for words that cannot be composed."""
        assert self.hydra_context is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, list(job))

    def _remember(self, combinations: Sequence[Sequence[str]]) -> None:
        """Note all runs of the grid, those not asked for now too: a report names the missing."""
        assert self.config is not None
        if not processes.first():
            return
        given = self.config.hydra.overrides.hydra
        place = [word for word in given if word.startswith("hydra.sweep.dir=")]
        for asked in combinations:
            jobs = grid.everything(self.rows, asked)
            directory = Path(self._composed(jobs[0]).hydra.sweep.dir)
            grid.remember(directory, {grid.place(job, self.rows)[1]: job + place for job in jobs})
