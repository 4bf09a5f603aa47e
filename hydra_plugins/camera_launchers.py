"""The launchers of conf/hydra/launcher that send the jobs of a sweep to SLURM and to Ray.

Both come back when every job has ended, whatever became of the others: one that was killed returns
the record that it couldn't write. Hydra takes launchers from this namespace only.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from experiments.sweeps.remote import RemoteJob

log = logging.getLogger(__name__)
PAUSE_S = 2
GONE = 3  # looks at a queue that doesn't have a job before it counts as gone


class RemoteLauncher(Launcher):
    """Sends jobs away, and waits until the last one has ended."""

    name: str
    needs: str  # the package without which it can't

    def __init__(self, **asked: Any) -> None:
        self.asked = {
            key: OmegaConf.to_container(value, resolve=True)
            if OmegaConf.is_config(value)
            else value
            for key, value in asked.items()
        }
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Each job's record or BUSY, in order; of one that was killed, a record of that."""
        from camera.runtime.errors import CameraError
        from experiments.sweeps.remote import RemoteJob

        assert self.config is not None and self.hydra_context and self.task_function
        try:
            importlib.import_module(self.needs)
        except ModuleNotFoundError as error:
            raise CameraError(
                f"hydra/launcher={self.name} needs the package {self.needs}: "
                f"pip install 'camera-moe[{self.name}]'."
            ) from error
        setup_globals()
        job = RemoteJob(self.hydra_context, self.config, self.task_function, Singleton.get_state())
        numbered = [(list(said), n) for n, said in enumerate(job_overrides, initial_job_idx)]
        for said, number in numbered:
            log.info("\t#%d : %s", number, " ".join(filter_overrides(said)))
        waits = self.send(job, numbered)
        return [self._end(number, wait) for (_, number), wait in zip(numbered, waits, strict=True)]

    @abstractmethod
    def send(
        self, job: RemoteJob, numbered: Sequence[tuple[list[str], int]]
    ) -> list[Callable[[], Any]]:
        """Start all; of each, a call that waits for what it returns and raises why it doesn't."""

    def _end(self, number: int, wait: Callable[[], Any]) -> JobReturn:
        from experiments.records.failures import one_line
        from experiments.records.files import SweepFiles

        assert self.config is not None
        end = JobReturn(status=JobStatus.COMPLETED)
        try:
            end.return_value = wait()
        except Exception as error:
            record = SweepFiles(Path(self.config.hydra.sweep.dir)).read_record(number) or {}
            why = one_line(error)
            log.warning("#%d ended without a word: %s", number, why)
            end.return_value = {"folder": record.get("folder"), "error": f"killed: {why}"}
        return end


class SlurmLauncher(RemoteLauncher):
    """Every job is one of a SLURM array, sent by submitit, and looked for in `squeue`.

    submitit itself asks `sacct`, which clusters without accounting don't have: there it would wait
    for a killed job for ever.
    """

    name, needs = "slurm", "submitit"

    def send(
        self, job: RemoteJob, numbered: Sequence[tuple[list[str], int]]
    ) -> list[Callable[[], Any]]:
        from submitit import AutoExecutor

        shared = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node")
        shared += ("tasks_per_node", "stderr_to_stdout")
        parameters = dict(self.asked)
        executor = AutoExecutor(
            parameters.pop("submitit_folder"),
            cluster="slurm",
            slurm_max_num_timeout=parameters.pop("max_num_timeout"),
        )
        executor.update_parameters(
            **{key if key in shared else f"slurm_{key}": v for key, v in parameters.items()}
        )
        sent = executor.map_array(job, *map(list, zip(*numbered, strict=True)))
        log.info("SLURM has them as %s", sent[0].job_id.partition("_")[0])
        return [_Waiting(one) for one in sent]


class _Waiting:
    """Waits for a job of submitit's."""

    def __init__(self, job: Any):
        self.job = job

    def __call__(self) -> Any:
        from camera.runtime.errors import CameraError

        missed = 0
        while not self._has_result():
            missed = missed + 1 if self._is_gone() else 0
            if missed == GONE:  # its result may need some time to show on this node's disk
                raise CameraError(f"SLURM's job {self.job.job_id} {self._state()}{self._reason()}")
            time.sleep(PAUSE_S)
        return self.job.results()[0]

    def _has_result(self) -> bool:
        folder = self.job.paths.folder
        os.utime(folder)  # a network disk's cache forgets what it knew of the folder
        return bool(self.job.paths.result_pickle.exists())

    def _is_gone(self) -> bool:
        asked = ["squeue", "--noheader", "--format=%T", f"--jobs={self.job.job_id}"]
        said = subprocess.run(asked, capture_output=True, text=True)
        if said.returncode:  # of a controller that doesn't answer nothing is known
            return "Invalid job id" in said.stderr
        return not said.stdout.strip()

    def _state(self) -> str:
        asked = ["scontrol", "--oneliner", "show", "job", self.job.job_id]
        said = subprocess.run(asked, capture_output=True, text=True).stdout
        states = [word[9:] for word in said.split() if word.startswith("JobState=")]
        return f"ended as {states[0]}" if states else "is not in the queue any more"

    def _reason(self) -> str:
        """What the node's daemon wrote to the job's log when it ended it."""
        logs = [path for path in (self.job.paths.stdout, self.job.paths.stderr) if path.exists()]
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        said = [line.partition("error: ")[2] for line in lines if line.startswith("slurmstepd")]
        return f": {said[0]}" if said else f"; its log: {logs[0]}" if logs else ""


class RayLauncher(RemoteLauncher):
    """Every job is a task of a Ray cluster, or of one that is started on this machine."""

    name, needs = "ray", "ray"

    def send(
        self, job: RemoteJob, numbered: Sequence[tuple[list[str], int]]
    ) -> list[Callable[[], Any]]:
        import ray

        from experiments.sweeps.remote import call

        if not ray.is_initialized():
            ray.init(**self.asked["ray"]["init"])
        task = ray.remote(call).options(**self.asked["ray"]["remote"])
        # what a task gets is stored once for all of them
        stored = ray.put(job)
        return [_fetching(task.remote(stored, *arguments)) for arguments in numbered]


def _fetching(reference: Any) -> Callable[[], Any]:
    def fetch() -> Any:
        import ray

        return ray.get(reference)

    return fetch
