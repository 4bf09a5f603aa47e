"""The end of a sweep: its table and that of all runs, whatever became of its jobs."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config.constructor import build
from experiments.records.failures import one_line
from experiments.records.files import INTERRUPTIONS, OutputFolder, RunFiles, SweepFiles
from experiments.records.outcome import outcome_of_sweep
from experiments.runs.tracker import CarefulTracker
from experiments.sweeps.drawing import draw_sweep
from experiments.sweeps.jobs import SweepJob
from experiments.sweeps.tracking import track_sweep

if TYPE_CHECKING:
    import pandas as pd

    from experiments.tables.pages import Page

log = logging.getLogger("camera")


def end_sweep(
    sweep: SweepFiles,
    output: OutputFolder,
    ends: Iterable[tuple[SweepJob, dict[str, Any] | None]],
    tracker: dict[str, Any] | None = None,
    preset: str | None = None,
) -> bool:
    """Write and print the tables, then what failed; whether all jobs are done.

    `ends` has each job with its record, or None where it wasn't started. A table that can't be
    written is printed all the same, and what failed is printed whatever becomes of the tables.
    A sweep that was gone through is told to the tracker too, whose settings are given.
    """
    found = list(ends)
    ended = {
        (_name(record["folder"], job), record["error"])
        for job, record in found
        if record and record["error"]
    }
    interrupted = {(name, error) for name, error in ended if error.startswith(INTERRUPTIONS)}
    failed = ended - interrupted
    waiting = sum(record is None for _, record in found)
    folders = [Path(record["folder"]) for _, record in found if record and record["folder"]]
    try:
        with _undisturbed():
            grids = {grid for job, _ in found for grid in job.grids}
            own = _tables(sweep, output, folders, sorted(failed), grids)
            figures = draw_sweep(sweep, own)
            for line in figures.lines:
                print(line)
            if tracker and not waiting:
                careful = CarefulTracker(build(tracker))
                track_sweep(careful, sweep, preset, own, figures.over_runs or None)
    except Exception as error:  # what failed is yet to be said
        log.error("The table can't be made: %s", one_line(error), exc_info=True)
    for folder, error in sorted(failed):
        print(f"failed: {folder}: {error}", file=sys.stderr)
    for folder, _ in sorted(interrupted):
        print(f"interrupted: {folder}", file=sys.stderr)
    if waiting:
        print(
            f"{waiting} {'job was' if waiting == 1 else 'jobs were'} not started.", file=sys.stderr
        )
    done = sum(record is not None and not record["error"] for _, record in found)
    print(f"{done} of {len(found)} jobs done; table: {sweep.table}")
    if finished := [folder for folder in dict.fromkeys(folders) if RunFiles(folder).is_done]:
        print("\n".join(outcome_of_sweep(finished, output)))
    return done == len(found)


def _name(folder: str | None, job: SweepJob) -> str:
    """What a failed job is called: its folder, or its settings where it was refused one."""
    return folder if folder and Path(folder).is_dir() else " ".join(job.overrides)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore SIGTERM, which torchrun sends to the others when a rank fails; Ctrl+C still works."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tables(
    sweep: SweepFiles,
    output: OutputFolder,
    folders: list[Path],
    failed: list[tuple[str, str]],
    grids: set[str],
) -> pd.DataFrame:
    from experiments.tables.layouts.terminal import print_page
    from experiments.tables.pages import paper_page
    from experiments.tables.rows import read_runs, with_dense_rows
    from experiments.tables.studies import asked_here
    from experiments.tables.writing import write

    everything = read_runs(output.runs() if folders else [])
    own = asked_here(with_dense_rows(everything, [folder.name for folder in folders]), grids)
    page = _with_failures(paper_page(own), own, failed)
    try:
        with output.lock("tables"):
            write(own, sweep.folder, page)
            write(everything, output.folder)
    except OSError as error:
        log.error("The tables can't be written: %s", one_line(error))
    print_page(page)
    return own


def _with_failures(page: Page, runs: pd.DataFrame, failed: list[tuple[str, str]]) -> Page:
    """The page, and notes about the failures that no row tells: of jobs that left no folder."""
    # without rows the columns aren't of texts
    told = runs.loc[runs["status"].astype(str).str.startswith("failed"), "folder"]
    untold = [(name, error) for name, error in failed if Path(name).name not in set(told)]
    return replace(page, notes=[*page.notes, *(f"{name}: {error}" for name, error in untold)])
