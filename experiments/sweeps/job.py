"""Hydra's task function and the callback that writes a sweep's table."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from camera.runtime.errors import CameraError
from experiments.config.settings import Settings
from experiments.records.failures import FailedBeforeError, one_line
from experiments.records.files import OutputFolder, SweepFiles
from experiments.records.folders import Folders
from experiments.sweeps.jobs import BUSY

log = logging.getLogger("camera")


def job(config: DictConfig) -> str | None:
    """Do one run; a failure ends a single run with exit code 1, and leaves a sweep to go on.

    In a sweep each job that ended writes `jobs/NUMBER.json` (its folder, its error) for the table;
    one whose run another process is doing returns BUSY, and is launched again later.
    """
    from camera.runtime import distributed
    from experiments.runs.run import run

    hydra = HydraConfig.get()
    sweep = SweepFiles(Path(hydra.sweep.dir)) if hydra.mode == RunMode.MULTIRUN else None
    folder, error, known = None, None, False
    try:
        settings = Settings.of(config)
        folder = Folders.of(settings).run
        if sweep:
            since = sweep.config.stat().st_mtime
            # the other ranks of a torchrun don't know who holds what
            run(settings, sweep=sweep.name, since=since, wait=distributed.world() > 1)
        else:
            done = run(settings)
            if distributed.rank() == 0:
                from experiments.tables.rows import read_runs
                from experiments.tables.writing import show

                show(read_runs([done]))
    except Timeout:
        log.info("%s is being done by another process: the others first.", folder)
        return BUSY
    except Exception as failure:
        error, known = one_line(failure), isinstance(failure, FailedBeforeError)
        # A traceback only for what the user can't fix.
        log.error("%s: %s", folder or "job", error, exc_info=not isinstance(failure, CameraError))
    if error and not known and distributed.world() > 1:
        sys.exit(1)  # and torchrun ends the others, which may wait for this one for ever
    if distributed.rank() > 0:
        return None
    if sweep:
        record = {"folder": str(folder) if folder else None, "error": error}
        sweep.record(hydra.job.num, record)
    elif error:
        sys.exit(1)
    return None


class SweepTable(Callback):
    """After the last job: this sweep's table and that of all runs; exit code 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        from camera.runtime import distributed
        from experiments.tables.rows import read_runs, with_dense_rows
        from experiments.tables.writing import show, write

        if distributed.rank() > 0:
            return
        output = OutputFolder(Path(config.output))
        sweep = SweepFiles(Path(config.hydra.sweep.dir))
        records = sweep.records()
        folders = dict.fromkeys(Path(record["folder"]) for record in records if record["folder"])
        with output.lock("tables"):
            everything = read_runs(output.runs() if folders else [])
            table = with_dense_rows(everything, [folder.name for folder in folders])
            write(table, sweep.folder)
            write(everything, output.folder)
        show(table)
        failed = [record for record in records if record["error"]]
        for folder, error in dict.fromkeys((job["folder"], job["error"]) for job in failed):
            print(f"failed: {folder or 'a job'}: {error}", file=sys.stderr)
        print(f"{len(records) - len(failed)} of {len(records)} jobs done; table: {sweep.table}")
        if failed:
            sys.exit(1)
