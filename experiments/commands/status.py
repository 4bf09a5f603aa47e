"""State of the sweeps and runs in a folder: `camera status DIR`, at any time.

DIR is an output folder, or the folder of one sweep. Nothing is written there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from camera.runtime.errors import CameraError
from experiments.config.location import add_output_folder
from experiments.records.failures import DamagedFileError, NoRunsError
from experiments.records.files import OutputFolder, RunFiles, SweepFiles
from experiments.sweeps.durations import Durations, elapsed, format_duration
from experiments.sweeps.jobs import SweepJob, read_plan

DONE, RUNNING, FAILED, TO_GO = "done", "running", "failed", "to go"
SINGLE = "single runs"
NOTHING_LIKE = ("", "", "")


@dataclass(frozen=True)
class Sweep:
    """Jobs, by the state that each is in."""

    name: str
    states: list[tuple[SweepJob, str]]

    def jobs_in(self, which: str) -> list[SweepJob]:
        return [job for job, state in self.states if state == which]

    def grids(self) -> list[Sweep]:
        """Its jobs by the grid that asked for them first."""
        parts: dict[str, list[tuple[SweepJob, str]]] = {}
        for job, state in self.states:
            parts.setdefault(job.grids[0] if job.grids else "", []).append((job, state))
        return [Sweep(name, states) for name, states in parts.items()]

    def distinct_overrides(self, job: SweepJob) -> str:
        """The overrides of a job that not all jobs of its sweep share."""
        others = [set(other.overrides) for other, _ in self.states]
        common = set.intersection(*others) if len(others) > 1 else set()
        return " ".join(text for text in job.overrides if text not in common)


def state(job: SweepJob) -> str:
    """done, running (a live process holds its lock), failed, or to go.

    What was interrupted is to go: it will go on where it stopped.
    """
    if job.run is None:
        return FAILED
    files = RunFiles(job.run)
    if files.is_done:
        return DONE
    if job.is_locked:
        return RUNNING
    refused = job.refused and not files.is_run
    return FAILED if files.failure or refused else TO_GO


def sweeps_of(folder: Path) -> list[Sweep]:
    """The sweeps below an output folder, oldest first, or the one that `folder` is.

    One is left out where newer ones have all that isn't done of it. Runs that no sweep asked for
    stand together at the end. CameraError if there is neither.
    """
    output = OutputFolder(folder)
    shown: list[Sweep] = []
    planned: set[Path | None] = set()
    for files in reversed([*output.sweeps()]):
        try:
            jobs = read_plan(files.folder)
        except DamagedFileError as error:
            print(error, file=sys.stderr)
            continue
        sweep = Sweep(files.name, [(job, state(job)) for job in jobs])
        if not shown or {job.run for job, found in sweep.states if found != DONE} - planned:
            shown.insert(0, sweep)
        planned |= {job.run for job in jobs}
    alone = [] if SweepFiles(folder).plan.exists() else set(output.runs()) - planned
    single = [SweepJob([], [], run, NOTHING_LIKE) for run in sorted(alone) if RunFiles(run).is_run]
    if single:
        shown.append(Sweep(SINGLE, [(job, state(job)) for job in single]))
    if not shown:
        raise NoRunsError(folder, "the folder that was `output`, or one of its sweeps/")
    return shown


def report(folder: Path) -> None:
    """Print how many jobs are in which state and the time left, then what runs, what failed."""
    sweeps = sweeps_of(folder)
    places = {job.run.parent for sweep in sweeps for job, _ in sweep.states if job.run}
    durations = Durations(run for place in places for run in place.glob("*"))
    Console().print(_table(sweeps, durations))
    told = {"running": _running, "failed": _failed, "interrupted": _interrupted}
    for heading, lines in ((heading, tell(sweeps)) for heading, tell in told.items()):
        if lines := list(dict.fromkeys(lines)):
            print(f"\n{heading}")
            print("\n".join(f"  {line}" for line in lines))


def _table(sweeps: Sequence[Sweep], durations: Durations) -> Table:
    table = Table("Jobs", box=None)
    for heading in (DONE, RUNNING, FAILED, TO_GO, "time left"):
        table.add_column(heading.capitalize(), justify="right")
    for sweep in sweeps:
        grids = sweep.grids()
        _add(table, sweep.name, sweep, durations)
        for grid in grids if len(grids) > 1 or grids[0].name else []:
            _add(table, f"  {grid.name}", grid, durations)
    return table


def _add(table: Table, name: str, sweep: Sweep, durations: Durations) -> None:
    counts = [len(sweep.jobs_in(which)) for which in (DONE, RUNNING, FAILED, TO_GO)]
    left = durations.left(sweep.jobs_in(TO_GO), sweep.jobs_in(RUNNING))
    time = "unknown" if left is None else format_duration(left)
    table.add_row(name, *map(str, counts), time if counts[1] or counts[3] else "")


def _running(sweeps: Sequence[Sweep]) -> Iterator[str]:
    for sweep in sweeps:
        for job in sweep.jobs_in(RUNNING):
            assert job.run
            name, since = job.run.name, format_duration(elapsed(job.run))
            yield f"{name}{_said(sweep, job)}, for {since}{_last_line(job.run)}"


def _last_line(run: Path) -> str:
    """The last line of a run's log: how far it is."""
    log = RunFiles(run).log
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return f"\n    {lines[-1]}" if lines else ""


def _failed(sweeps: Sequence[Sweep]) -> Iterator[str]:
    for sweep in sweeps:
        for job in sweep.jobs_in(FAILED):
            name = job.run.name if job.run else "a job"
            reason = (RunFiles(job.run).failure if job.run else None) or job.refused
            yield f"{name}{_said(sweep, job)}: {reason}"


def _interrupted(sweeps: Sequence[Sweep]) -> Iterator[str]:
    for sweep in sweeps:
        for job in sweep.jobs_in(TO_GO):
            if job.run and RunFiles(job.run).reason:
                yield f"{job.run.name}{_said(sweep, job)}: the same command goes on"


def _said(sweep: Sweep, job: SweepJob) -> str:
    overrides = sweep.distinct_overrides(job)
    return f" ({overrides})" if overrides else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="camera status", description=__doc__)
    add_output_folder(parser, "the folder that was `output`, or one of its sweeps/")
    try:
        report(parser.parse_args(arguments).folder)
    except CameraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
