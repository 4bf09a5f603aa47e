"""How far the sweeps of a folder are: `python -m experiments.status DIR`, at any time.

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
from experiments.records.failures import failure
from experiments.records.folders import LOG
from experiments.sweeps.durations import Durations, elapsed, spoken
from experiments.sweeps.jobs import PLAN, Job, read_plan

DONE, RUNNING, FAILED, TO_GO = "done", "running", "failed", "to go"


@dataclass(frozen=True)
class Sweep:
    """Jobs, by the state that each is in."""

    name: str
    states: list[tuple[Job, str]]

    def those(self, which: str) -> list[Job]:
        return [job for job, state in self.states if state == which]

    def grids(self) -> list[Sweep]:
        """Its jobs by the grid that asked for them first."""
        parts: dict[str, list[tuple[Job, str]]] = {}
        for job, state in self.states:
            parts.setdefault(job.grids[0] if job.grids else "", []).append((job, state))
        return [Sweep(name, states) for name, states in parts.items()]

    def told(self, job: Job) -> str:
        """What sets the job apart from the others of its sweep."""
        others = [set(other.overrides) for other, _ in self.states]
        common = set.intersection(*others) if len(others) > 1 else set()
        return " ".join(text for text in job.overrides if text not in common)


def state(job: Job) -> str:
    """done, running (a live process holds its lock), failed, or to go.

    What was interrupted is to go: it will go on where it stopped.
    """
    if job.run is None:
        return FAILED
    if (job.run / "DONE").exists():
        return DONE
    if job.held:
        return RUNNING
    return FAILED if failure(job.run) else TO_GO


def sweeps_of(folder: Path) -> list[Sweep]:
    """The sweeps below an output folder, oldest first, or the one that `folder` is.

    One is left out where newer ones have all that isn't done of it. CameraError if there is none.
    """
    own = folder / PLAN
    plans = [own] if own.exists() else sorted(folder.glob(f"sweeps/*/{PLAN}"))
    shown: list[Sweep] = []
    planned: set[Path | None] = set()
    for plan in reversed(plans):
        jobs = read_plan(plan.parent)
        sweep = Sweep(plan.parent.name, [(job, state(job)) for job in jobs])
        if not shown or {job.run for job, found in sweep.states if found != DONE} - planned:
            shown.insert(0, sweep)
        planned |= {job.run for job in jobs}
    if not shown:
        raise CameraError(
            f"{folder} has no sweep: give the folder that was `output`, or one of its sweeps/."
        )
    return shown


def report(folder: Path) -> None:
    """Print how many jobs are in which state and the time left, then what runs, what failed."""
    sweeps = sweeps_of(folder)
    places = {job.run.parent for sweep in sweeps for job, _ in sweep.states if job.run}
    durations = Durations(run for place in places for run in place.glob("*"))
    Console().print(_table(sweeps, durations))
    for heading, lines in (("running", _running(sweeps)), ("failed", _failed(sweeps))):
        if lines := list(dict.fromkeys(lines)):
            print(f"\n{heading}")
            print("\n".join(f"  {line}" for line in lines))


def _table(sweeps: Sequence[Sweep], durations: Durations) -> Table:
    table = Table("Sweep", box=None)
    for heading in (DONE, RUNNING, FAILED, TO_GO, "time left"):
        table.add_column(heading.capitalize(), justify="right")
    for sweep in sweeps:
        grids = sweep.grids()
        _add(table, sweep.name, sweep, durations)
        for grid in grids if len(grids) > 1 or grids[0].name else []:
            _add(table, f"  {grid.name}", grid, durations)
    return table


def _add(table: Table, name: str, sweep: Sweep, durations: Durations) -> None:
    counts = [len(sweep.those(which)) for which in (DONE, RUNNING, FAILED, TO_GO)]
    left = durations.left(sweep.those(TO_GO), sweep.those(RUNNING))
    told = "unknown" if left is None else spoken(left)
    table.add_row(name, *map(str, counts), told if counts[1] or counts[3] else "")


def _running(sweeps: Sequence[Sweep]) -> Iterator[str]:
    for sweep in sweeps:
        for job in sweep.those(RUNNING):
            assert job.run
            name, since = job.run.name, spoken(elapsed(job.run))
            yield f"{name} ({sweep.told(job)}), for {since}{_last_line(job.run)}"


def _last_line(run: Path) -> str:
    """The last line of a run's log: how far it is."""
    log = run / LOG
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return f"\n    {lines[-1]}" if lines else ""


def _failed(sweeps: Sequence[Sweep]) -> Iterator[str]:
    for sweep in sweeps:
        for job in sweep.those(FAILED):
            reason = failure(job.run) if job.run else job.refused
            yield f"{job.run.name if job.run else 'a job'} ({sweep.told(job)}): {reason}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.status", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    try:
        report(parser.parse_args(arguments).folder)
    except CameraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
