"""The launches of a sweep: every job of it once, whatever becomes of the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from experiments.records.failures import one_line
from experiments.records.files import LOST, SweepFiles
from experiments.sweeps.jobs import BUSY, SweepJob

log = logging.getLogger("camera")
PAUSE_S = 2


class Launches:
    """Launches jobs, and knows how each ended as soon as it has: also when a launch is broken off.

    Jobs that other processes are doing come last. What a launcher that broke had not started is
    launched again; what it was doing, each by itself, so that one that dies takes none with it.
    """

    def __init__(self, launcher: Launcher, sweep: SweepFiles):
        self.launcher, self.sweep = launcher, sweep
        self.returns: list[Sequence[JobReturn]] = []
        self._launched: list[SweepJob] = []  # by number
        self._ended: dict[int, dict[str, Any]] = {}  # what came back, by number

    def launch_all(self, jobs: Sequence[SweepJob]) -> None:
        """Launch until every job has ended; what a launcher raises before any starts is raised."""
        batch, busy, lost = list(jobs), [], []
        while batch:
            outcomes = self._launch(batch)
            busy += [job for job, out in outcomes if out == BUSY]
            if len(batch) > 1:
                lost += [job for job, out in outcomes if out and out != BUSY and _is_lost(out)]
            batch = [job for job, out in outcomes if out is None]
            if not batch and lost:
                batch = [lost.pop(0)]
            elif not batch:
                batch = _freed(busy)
                busy = [job for job in busy if job not in batch]

    def ends(self, jobs: Sequence[SweepJob]) -> Iterator[tuple[SweepJob, dict[str, Any] | None]]:
        """Each job with the record of how it ended; None where it never started."""
        for job in jobs:
            numbers = [number for number, other in enumerate(self._launched) if other is job]
            found = [self._ended.get(n) or self.sweep.read_record(n) for n in reversed(numbers)]
            yield job, next(filter(None, found), None)

    def _launch(self, jobs: Sequence[SweepJob]) -> list[tuple[SweepJob, Any]]:
        """Launch them together; each with its record, BUSY, or None where it wasn't started."""
        first = len(self._launched)
        self._launched += jobs
        overrides = [job.overrides for job in jobs]
        numbers = range(first, first + len(jobs))
        try:
            returns = self.launcher.launch(overrides, initial_job_idx=first)
        except Exception as error:
            outcomes: list[Any] = [self.sweep.read_record(number) for number in numbers]
            if not any(outcomes):
                raise  # nothing was started, nor would be
            log.warning("The launcher broke off: %s. Going on with the others.", one_line(error))
        else:
            self.returns.append(returns)
            outcomes = [end.return_value for end in returns]  # raises what a job raised
        ended = zip(numbers, outcomes, strict=True)
        self._ended |= {number: out for number, out in ended if out and out != BUSY}
        return list(zip(jobs, outcomes, strict=True))


def _is_lost(record: dict[str, Any]) -> bool:
    return record["error"] == LOST


def _freed(busy: Sequence[SweepJob]) -> list[SweepJob]:
    """Those that no other process holds any more, as soon as there is one."""
    while busy:
        free = [job for job in busy if not job.is_locked]
        if free:
            return free
        time.sleep(PAUSE_S)
    return []
