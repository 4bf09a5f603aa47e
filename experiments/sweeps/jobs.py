"""The jobs of a sweep, known before the first one starts: plan.json beside its multirun.yaml."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, flag_override, open_dict

from camera.runtime.errors import CameraError
from camera.runtime.files import write_json
from experiments.config.settings import Settings
from experiments.records.failures import one_line
from experiments.records.files import OutputFolder, SweepFiles, is_locked, read_json
from experiments.records.folders import Folders, cost_class

BUSY = "busy"  # the return value of a job whose run is locked by another process


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep: what was asked for, by which grids, and its folder.

    A request that is refused says why, and has no folder where its settings have no meaning; `like`
    names what takes about as long, `same` has the overrides of other requests for the same run,
    `settings` are known while it is planned.
    """

    overrides: list[str]
    grids: list[str]
    run: Path | None = None
    like: tuple[str, ...] = ()
    refused: str | None = None
    same: list[list[str]] = field(default_factory=list)
    settings: Settings | None = field(default=None, compare=False, repr=False)

    @property
    def is_locked(self) -> bool:
        """Whether a live process is doing it."""
        return self.run is not None and is_locked(self.run)


def planned(
    asked: Iterable[tuple[str | None, list[str]]],
    config: DictConfig,
    loader: ConfigLoader,
    check: Callable[[Settings, Path], None] | None = None,
) -> list[SweepJob]:
    """The jobs, in order, each run once: what ends in the same folder is the same run.

    `config` is that of the sweep; `check` raises CameraError for a run that will be refused.
    Hydra's errors, for what doesn't compose, pass through.
    """
    composed: dict[tuple[str, ...], SweepJob] = {}
    jobs: dict[Path | tuple[str, ...], SweepJob] = {}
    for grid, overrides in asked:
        said = tuple(overrides)
        new = said not in composed
        if new:
            composed[said] = _job(loader.load_sweep_config(config, overrides), overrides)
        key = composed[said].run or said
        if key not in jobs:
            jobs[key] = _checked(composed[said], check)
        elif new:
            jobs[key].same.append(list(overrides))
        job = jobs[key]
        if grid and grid not in job.grids:
            job.grids.append(grid)
    return list(jobs.values())


def _job(config: DictConfig, overrides: list[str]) -> SweepJob:
    asked = copy.deepcopy(config)
    with flag_override(asked, "readonly", False), open_dict(asked):
        del asked["hydra"]
    try:
        settings = Settings.of(asked)
        folders = Folders.of(settings)
    except Exception as error:
        # The job will fail of it, and say so; the others go on.
        return SweepJob(overrides, [], refused=one_line(error))
    like = cost_class(settings.model["name"], settings.method_name, folders.identity)
    return SweepJob(overrides, [], folders.run, like, settings=settings)


def _checked(job: SweepJob, check: Callable[[Settings, Path], None] | None) -> SweepJob:
    if check is None or job.settings is None or job.run is None:
        return job
    try:
        check(job.settings, job.run)
    except CameraError as refusal:
        return replace(job, refused=one_line(refusal))
    return job


def write_plan(jobs: Iterable[SweepJob], sweep: Path, output: Path) -> None:
    """Write plan.json to the sweep's folder.

    Runs are named, and `output` is relative to that folder, so that the whole may move.
    """
    rows = [asdict(replace(job, settings=None)) | {"run": job.run and job.run.name} for job in jobs]
    for row in rows:
        del row["settings"]
    where = os.path.relpath(output, sweep)
    write_json(SweepFiles(sweep).plan, {"output": where, "started": time.time(), "jobs": rows})


def read_plan(sweep: Path) -> list[SweepJob]:
    """The jobs that were written there."""
    plan: dict[str, Any] = read_json(SweepFiles(sweep).plan)
    output = OutputFolder(Path(os.path.normpath(sweep / plan["output"])))
    return [
        SweepJob(**row | {"run": row["run"] and output.run(row["run"]), "like": tuple(row["like"])})
        for row in plan["jobs"]
    ]
