"""Expected durations of runs, from finished runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from experiments.records.files import RunFiles, is_json, read_json
from experiments.records.folders import cost_class
from experiments.sweeps.jobs import SweepJob

MINUTE, HOUR, DAY = 60, 3600, 86400


class Durations:
    """Medians over finished runs: of the same model, method and evaluation, or the nearest."""

    def __init__(self, runs: Iterable[Path]):
        self.seconds: dict[tuple[str, ...], list[float]] = {}
        for run in map(RunFiles, runs):
            if run.is_done and is_json(run.settings):
                took = _took(run)
                for like in _wider(_cost_class(run)):
                    self.seconds.setdefault(like, []).append(took)

    def expected_seconds(self, job: SweepJob) -> float | None:
        """Seconds that the job will take from its start; None where no run is finished."""
        known = (self.seconds[like] for like in _wider(job.like) if like in self.seconds)
        return next(map(median, known), None)

    def left(self, to_go: Iterable[SweepJob], running: Iterable[SweepJob]) -> float | None:
        """Seconds until all are done, if as many processes go on as there are running, or one."""
        to_go, running = list(to_go), list(running)
        expected = [self.expected_seconds(job) for job in [*to_go, *running]]
        if None in expected:
            return None
        spent = [0.0] * len(to_go) + [elapsed(job.run) if job.run else 0.0 for job in running]
        total = sum(max(e - s, 0.0) for e, s in zip(expected, spent, strict=True) if e is not None)
        return total / max(len(running), 1)


def elapsed(run: Path) -> float:
    """Seconds since a run was last started."""
    file = RunFiles(run).settings  # written anew at every start
    return time.time() - file.stat().st_mtime if file.exists() else 0.0


def format_duration(seconds: float) -> str:
    """A duration in its largest fitting unit: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.1f} days"


def _took(run: RunFiles) -> float:
    seconds = read_json(run.metrics)["seconds"]
    parts = sum(seconds[part] for part in ("calibrate", "compress", "evaluate"))
    # The files know what loading took, the parts what was done before a run was interrupted.
    wall = run.done.stat().st_mtime - run.settings.stat().st_mtime
    return max(parts, wall)


def _cost_class(run: RunFiles) -> tuple[str, ...]:
    stored = read_json(run.settings)
    model, identity = stored["settings"]["model"]["name"], stored["identity"]
    return cost_class(model, stored["method"], identity)


def _wider(like: tuple[str, ...]) -> list[tuple[str, ...]]:
    model, method, evaluation = like
    return [(model, method, evaluation), (model, evaluation), (model,), ()]
