"""The jobs that a command would do, and what they would take: `dry_run=true`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.config.settings import Settings
from experiments.config.terminal import folded
from experiments.records.files import OutputFolder, RunFiles
from experiments.records.folders import Folders
from experiments.records.outcome import size_of
from experiments.sweeps.durations import Durations, format_duration
from experiments.sweeps.jobs import SweepJob

UNKNOWN = "?"


def list_jobs(jobs: Sequence[SweepJob], output: OutputFolder) -> None:
    """Print the jobs with state, disk and time, and the sums of what is to do; nothing is written.

    Disk is that of the checkpoints, by the ratio that is asked for; time is that of finished runs
    of the same kind in `output`, or the nearest kind.
    """
    durations = Durations(output.runs() if output.folder.is_dir() else [])
    table = Table("#", "Job", "State", "Disk", "Time", box=None)
    bytes_to_come, seconds, unknown, made = 0, 0.0, 0, set()
    for number, job in enumerate(jobs):
        state = _state(job)
        disk = time = None
        if state == "to do" and job.settings is not None:
            checkpoint = Folders.of(job.settings).checkpoint
            disk = 0 if checkpoint in made or checkpoint.exists() else expected_bytes(job.settings)
            time = durations.expected_seconds(job)
            made.add(checkpoint)
            bytes_to_come += disk or 0
            seconds += time or 0.0
            unknown += time is None
        name = job.run.name if job.run else " ".join(job.overrides)
        texts = (_size(disk), UNKNOWN if time is None else format_duration(time))
        table.add_row(str(number), name, state, *(texts if state == "to do" else ("", "")))
    Console().print(table)
    count = sum(_state(job) == "to do" for job in jobs)
    total = "unknown, no run has finished" if unknown else f"about {format_duration(seconds)}"
    free = size_of(shutil.disk_usage(_there(output.folder)).free)
    said = (
        f"dry_run: {count} of {len(jobs)} jobs to do; time: {total}, one after another; "
        f"checkpoints: about {size_of(bytes_to_come)}, {free} free."
    )
    print(folded(said))


def expected_bytes(settings: Settings) -> int | None:
    """Bytes of the checkpoint at the ratio that is asked for; None for a model that isn't here."""
    if not settings.compresses:
        return 0
    if not Path(settings.model_path).is_dir():
        return None
    from experiments.runs.compression import budget_of

    dense, method = budget_of(settings).dense, settings.method
    if method.get("sparsity") is not None:
        removed = method["sparsity"] * getattr(dense, method.get("sparsity_of", "moe"))
        return round(dense.bytes * (1 - removed / dense.model))
    if method.get("bits") is not None:
        return round(dense.bytes * (1 - dense.moe / dense.model) + dense.moe * method["bits"] / 8)
    return dense.bytes


def _state(job: SweepJob) -> str:
    if job.run is not None and RunFiles(job.run).is_done:
        return "done" if job.settings is None or not job.settings.force else "to do"
    if job.refused:
        return "refused"
    return "running" if job.is_locked else "to do"


def _size(size: int | None) -> str:
    return UNKNOWN if size is None else size_of(size) if size else ""


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
