"""The sweeper of `conf/hydra/sweeper/grids.yaml`; Hydra takes sweepers from this namespace only."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:  # Hydra loads this module at every --help and at each TAB
    from experiments.sweeps.jobs import SweepJob

log = logging.getLogger(__name__)
PAUSE_S = 2


class GridSweeper(Sweeper):
    """Launches every run of a union of grids once, and those last that other processes are doing.

    Each grid is a product of choices; the command line wins over a grid, a grid over `params`.
    What is to be done stands in the sweep's plan.json before the first job starts.
    """

    def __init__(
        self,
        params: dict[str, Any] | None = None,
        grids: dict[str, list[dict[str, Any]] | None] | None = None,
    ):
        self.params = params or {}
        self.grids = grids or {}
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Plan, launch, and wait for what others are doing; what each launch returned."""
        from camera.runtime import distributed
        from experiments.records.files import SweepFiles
        from experiments.sweeps.grids import overrides_of
        from experiments.sweeps.jobs import planned, write_plan

        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        asked = overrides_of(self.params, self.grids, arguments, loader)
        log.info("Planning %d jobs", len(asked))
        jobs = planned(asked, self.config, loader)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, SweepFiles(folder).config)
        if distributed.rank() == 0:
            write_plan(jobs, folder, Path(self.config.output))
        return self._launch(jobs)

    def _launch(self, jobs: list[SweepJob]) -> list[Sequence[JobReturn]]:
        from experiments.sweeps.jobs import BUSY

        assert self.launcher is not None
        returns: list[Sequence[JobReturn]] = []
        busy: list[SweepJob] = []
        while jobs:
            number = sum(map(len, returns))
            overrides = [job.overrides for job in jobs]
            returns.append(self.launcher.launch(overrides, initial_job_idx=number))
            # return_value raises what a job raised
            busy += [
                job for job, end in zip(jobs, returns[-1], strict=True) if end.return_value == BUSY
            ]
            jobs = _freed(busy)
            busy = [job for job in busy if job not in jobs]
        return returns


def _freed(busy: list[SweepJob]) -> list[SweepJob]:
    """Those that no other process holds any more, as soon as there is one."""
    while busy:
        free = [job for job in busy if not job.is_locked]
        if free:
            return free
        time.sleep(PAUSE_S)
    return []
