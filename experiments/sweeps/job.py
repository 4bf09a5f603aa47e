"""Hydra's task function: one job, recorded whether it succeeds, fails or is interrupted."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from camera.runtime.errors import CameraError
from experiments.config.settings import Settings
from experiments.records.failures import naming_output, one_line
from experiments.records.files import LOST, RunFiles, SweepFiles, is_json, read_json
from experiments.records.folders import Folders, cost_class
from experiments.records.interruptions import deferred_interruptions
from experiments.records.outcome import outcome
from experiments.runs.summary import numbers_of
from experiments.sweeps.jobs import BUSY, SweepJob, read_plan
from experiments.sweeps.planning.advice import check_planned
from experiments.sweeps.planning.dry_run import list_jobs

log = logging.getLogger("camera")


def job(config: DictConfig) -> dict[str, Any] | str | float | None:
    """Do one run; a failure ends a single run with exit code 1, and leaves a sweep to go on.

    In a sweep each job that ended returns its record (its folder, its error), which stands in
    `jobs/NUMBER.json` too; one whose run another process is doing returns BUSY, and is launched
    again later. To a sweeper that searches it returns the number that `objective` names, and
    raises what failed.
    """
    if config.dry_run:
        return _list(config)
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        if _beside_others(hydra):
            from camera.runtime.device.accelerator import share_cards

            share_cards(hydra.job.num)
        sweep = SweepFiles(Path(hydra.sweep.dir))
        basic = hydra.sweeper._target_.endswith(".BasicSweeper")  # Hydra's own, which wants nothing
        if not sweep.plan.exists() and not basic:
            return _trial(config, sweep, hydra.job.num)
        return _job_of_sweep(config, sweep, hydra.job.num)
    if _failure(config, None) is not None:
        sys.exit(1)
    return None


def _beside_others(hydra: Any) -> bool:
    """Whether other jobs of the sweep run on this machine at the same time, and see its cards.

    SLURM and Ray give a job the cards that it asks for, and hide the others.
    """
    return "joblib" in hydra.launcher._target_ and hydra.launcher.n_jobs != 1


def _list(config: DictConfig) -> None:
    """Say what the run would do."""
    settings = Settings.of(config)
    folders = Folders.of(settings)
    like = cost_class(settings.model["name"], settings.method_name, folders.identity)
    try:
        check_planned(settings, folders.run, here=True)
    except CameraError as refusal:
        log.error(refusal)
        sys.exit(1)
    list_jobs([SweepJob([], [], folders.run, like, settings=settings)], folders.output)


def _trial(config: DictConfig, sweep: SweepFiles, number: int) -> float:
    """A job of a sweeper that isn't this project's and wants a number."""
    if config.objective is None:
        raise CameraError(
            "This sweeper searches for the best value of a number: name it, for instance "
            "objective=average or objective=perplexity/wikitext2."
        )
    record = _job_of_sweep(config, sweep, number)
    if record["error"] is not None:
        raise CameraError(record["error"])
    return numbers_of(read_json(RunFiles(Path(record["folder"])).metrics))[config.objective]


def _job_of_sweep(config: DictConfig, sweep: SweepFiles, number: int) -> Any:
    from experiments.runs import ranks

    folder = _folder(config)
    _record(sweep, number, folder, LOST)
    try:
        error = _failure(config, sweep)
    except Timeout:
        log.info("%s is being done by another process: the others first.", folder)
        sweep.job(number).unlink(missing_ok=True)
        return BUSY
    except BaseException as interruption:
        _record(sweep, number, folder, one_line(interruption))
        raise
    _record(sweep, number, folder, error)
    if ranks.apart():
        sys.exit(1)  # and torchrun ends the others, which may wait for this one for ever
    return {"folder": str(folder) if folder else None, "error": error}


def _failure(config: DictConfig, sweep: SweepFiles | None) -> str | None:
    """Why the run failed, in one line, which is in the log then; None where it is done."""
    from camera.runtime import distributed
    from experiments.runs.run import run

    try:
        settings, preset = Settings.of(config), preset_of(HydraConfig.get())
        with naming_output(Path(settings.output)):
            if sweep is None:
                studies = [preset] if preset else []
                done = run(settings, preset=preset, studies=studies)
                if distributed.rank() == 0:
                    _show(done, studies)
            else:
                # which of the ranks are told is of no matter: the first alone decides by it
                since = sweep.config.stat().st_mtime if sweep.config.exists() else None
                # the other ranks of a torchrun don't know who holds what, other sweepers not BUSY
                wait = distributed.world() > 1 or not sweep.plan.exists()
                studies = _grids(sweep, config) or ([preset] if preset else [])
                about = {"preset": preset, "studies": studies}
                run(settings, sweep=sweep.name, since=since, wait=wait, **about)
    except Timeout:
        raise
    except Exception as failure:
        error = one_line(failure)
        # A traceback only for what the user can't fix.
        expected = isinstance(failure, CameraError)
        folder = _folder(config)
        place = f"{folder}: " if folder and folder.is_dir() else ""  # what is refused leaves none
        log.error("%s%s", place, error, exc_info=not expected)
        return error
    return None


def preset_of(hydra: Any) -> str | None:
    """The name of the preset that was asked for, from Hydra's own configuration."""
    chosen = hydra.runtime.choices.get("experiment")
    return chosen if chosen is None or isinstance(chosen, str) else "+".join(chosen)


def _grids(sweep: SweepFiles, config: DictConfig) -> list[str]:
    """The grids of the sweep's preset that ask for the run."""
    folder = _folder(config)
    planned = read_plan(sweep.folder) if is_json(sweep.plan) else []
    return [grid for job in planned if job.run == folder for grid in job.grids]


def _show(run: Path, studies: list[str]) -> None:
    from experiments.tables.rows import read_runs
    from experiments.tables.writing import show

    show(read_runs([run]).assign(studies=[studies]))  # not those of sweeps that shared it
    print("\n".join(outcome(run)))


def _folder(config: DictConfig) -> Path | None:
    """The run's folder; None where the settings are refused, which `run` says."""
    try:
        return Folders.of(Settings.of(config)).run
    except Exception:
        return None


def _record(sweep: SweepFiles, number: int, folder: Path | None, error: str | None) -> None:
    from camera.runtime import distributed

    if distributed.rank() > 0:
        return
    try:
        with deferred_interruptions():
            sweep.record(number, folder, error)
    except OSError as full:  # the job's end is in the log, and in the table of this process
        log.error("%s can't be written: %s", sweep.job(number), one_line(full))
