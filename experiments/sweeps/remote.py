"""One job of a sweep in another process, perhaps on another machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class RemoteJob:
    """What a worker calls to do one job; all that it needs travels with it."""

    hydra_context: HydraContext
    config: DictConfig
    task_function: TaskFunction
    singletons: Any

    def __call__(self, overrides: list[str], number: int) -> Any:
        """Do the job; what the task function returned."""
        Singleton.set_state(self.singletons)
        setup_globals()
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config.hydra.job) as job:
            job.id, job.num = str(number), number
        done = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        return done.return_value

    def checkpoint(self, overrides: list[str], number: int) -> Any:
        """What submitit puts back into the queue: the same again, as a run goes on by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, overrides, number)


def call(job: RemoteJob, overrides: list[str], number: int) -> Any:
    """What the job returns."""
    return job(overrides, number)
