"""The sweeper of `conf/hydra/sweeper/grids.yaml`; Hydra takes sweepers from this namespace only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:  # Hydra loads this module at every --help and at each TAB
    from experiments.records.files import SweepFiles
    from experiments.sweeps.jobs import SweepJob

log = logging.getLogger(__name__)


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
        """Plan, launch, wait for what others are doing, and end in the table; what was returned.

        The table comes also when the launches are interrupted or fail. Exit code 1 if a job failed.
        """
        from camera.runtime import distributed
        from camera.runtime.errors import CameraError
        from experiments.config.location import user_path
        from experiments.records.files import OutputFolder, SweepFiles
        from experiments.sweeps.ending import end_sweep
        from experiments.sweeps.job import preset_of
        from experiments.sweeps.launches import Launches

        assert self.config is not None and self.launcher is not None
        sweep = SweepFiles(Path(self.config.hydra.sweep.dir))
        try:
            jobs = self._planned(arguments, sweep)
        except CameraError as error:
            print(error, file=sys.stderr)
            sys.exit(1)
        if self.config.dry_run:
            return []
        launches = Launches(self.launcher, sweep)
        all_done = False
        try:
            launches.launch_all(jobs)
        except CameraError as error:  # of a launcher that starts nothing
            print(error, file=sys.stderr)
            sys.exit(1)
        finally:
            if distributed.rank() == 0:
                output = OutputFolder(Path(user_path(self.config.output)))
                asked = self.config.tracker
                tracker = OmegaConf.to_container(asked, resolve=True, enum_to_str=True)
                preset = preset_of(self.config.hydra)
                all_done = end_sweep(sweep, output, launches.ends(jobs), tracker, preset)
        if distributed.rank() == 0 and not all_done:
            sys.exit(1)
        return launches.returns

    def _planned(self, arguments: list[str], sweep: SweepFiles) -> list[SweepJob]:
        from camera.runtime import distributed
        from experiments.config.location import user_path
        from experiments.records.failures import naming_output
        from experiments.records.files import OutputFolder
        from experiments.sweeps.grids import overrides_of
        from experiments.sweeps.jobs import planned, write_plan
        from experiments.sweeps.planning.advice import advice, check_planned
        from experiments.sweeps.planning.dry_run import list_jobs

        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        asked = overrides_of(self.params, self.grids, arguments, loader)
        log.info("Planning %d job%s", len(asked), "" if len(asked) == 1 else "s")
        remote = "camera_launchers" in self.config.hydra.launcher._target_
        jobs = planned(asked, self.config, loader, partial(check_planned, here=not remote))
        for sentence in advice(jobs, self.grids, arguments):
            log.warning(sentence)
        if self.config.dry_run and distributed.rank() == 0:
            list_jobs(jobs, OutputFolder(Path(user_path(self.config.output))))
        if not self.config.dry_run and distributed.rank() == 0:
            output = Path(user_path(self.config.output))
            with naming_output(output):
                sweep.folder.mkdir(parents=True, exist_ok=True)
                OmegaConf.save(self.config, sweep.config)
                write_plan(jobs, sweep.folder, output)
        distributed.barrier()
        return jobs
