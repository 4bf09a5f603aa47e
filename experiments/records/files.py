"""The files of a run and the folders of an output: the one place that names them.

output/
  runs/RUN/          settings.json, studies.json, PART.json, metrics.json, DONE, error.txt, log.txt,
                     figures, wandb/ (experiments.runs.wandb_files)
  checkpoints/RUN/   the compressed model
  statistics/        statistics of dense models, shared by runs
  sweeps/SWEEP/      multirun.yaml, plan.json, jobs/NUMBER.json, tables
  locks/             one file a lock
  figures/           figures over several runs
  hidden/            hidden states of an evaluation that is streamed
  data/              texts of the embedded model
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from camera.runtime.files import partial_of, write_json
from experiments.records.failures import DamagedFileError

COMPRESSION, SPEED = "compress", "speed"  # parts of a run
# parts of a run, before the name of a text or a task
PERPLEXITY, TASK, GENERATIVE = "perplexity-", "task-", "generative-"
# A user who presses Ctrl+C, a queue that takes a job off, submitit's word for one that it took
# off too often: no reason not to go on.
INTERRUPTIONS = ("KeyboardInterrupt", "SystemExit", "UncompletedJobError")
LOST = "killed: it left no record of how it ended"  # the error of a job that is being done


@dataclass(frozen=True)
class RunFiles:
    """The files of one run's folder; each is whole or absent."""

    folder: Path

    @property
    def settings(self) -> Path:
        """What was asked for, written anew at every start."""
        return self.folder / "settings.json"

    @property
    def metrics(self) -> Path:
        """The report of a finished run."""
        return self.folder / "metrics.json"

    @property
    def error(self) -> Path:
        """Why the run failed: one line, then the traceback."""
        return self.folder / "error.txt"

    @property
    def done(self) -> Path:
        """The last file of a run: an empty marker."""
        return self.folder / "DONE"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def energies(self) -> Path:
        """The summary of the energies that the run saw."""
        return self.folder / "energies.json"

    def part(self, name: str) -> Path:
        """The file of one part of the run: compress, speed, perplexity-TEXT, task-NAME."""
        return self.folder / f"{name}.json"

    def figure(self, name: str) -> Path:
        """The PNG of a figure; its PDF has the same name."""
        return self.folder / f"{name}.png"

    def figures(self) -> list[Path]:
        """The PNGs that were drawn."""
        return sorted(self.folder.glob("*.png"))

    @property
    def studies(self) -> list[str]:
        """The grids of presets that asked for the run, or presets; none for a run by itself."""
        file = self.folder / "studies.json"
        return read_json(file)["studies"] if is_json(file) else []

    def enter_studies(self, names: Iterable[str]) -> None:
        """Add studies that ask for the run; the caller holds its lock."""
        known = self.studies
        if new := [name for name in names if name not in known]:
            write_json(self.folder / "studies.json", {"studies": [*known, *new]})

    @property
    def is_run(self) -> bool:
        """Whether a run was ever started in this folder."""
        return self.settings.exists()

    @property
    def is_done(self) -> bool:
        """Whether it finished and its report is still there to be read."""
        return self.done.exists() and is_json(self.metrics)

    @property
    def reason(self) -> str | None:
        """The line that says why the run ended early, failed or interrupted."""
        if not self.error.exists():
            return None
        text = self.error.read_text(encoding="utf-8", errors="replace")
        return text.splitlines()[0] if text.strip() else "its error.txt is empty (a full disk?)"

    @property
    def failure(self) -> str | None:
        """Why the run failed; None where it didn't, or was interrupted and would go on."""
        reason = self.reason
        return None if reason is None or reason.startswith(INTERRUPTIONS) else reason

    @property
    def was_interrupted(self) -> bool:
        """Whether it ended early for no reason not to go on."""
        return self.reason is not None and self.failure is None

    def read_part(self, name: str) -> dict[str, Any] | None:
        """What a part reported; None before it is done, and where that can't be read."""
        file = self.part(name)
        return read_json(file) if is_json(file) else None

    def start(self, settings: dict[str, Any]) -> None:
        """Write settings.json, and forget why the run ended early before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.error.unlink(missing_ok=True)
        write_json(self.settings, settings)

    def fail(self, reason: str, details: str) -> None:
        """Write error.txt: the reason in one line, then the details."""
        write_text(self.error, f"{reason}\n\n{details}")

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json; DONE follows once the trackers have it too."""
        write_json(self.metrics, metrics)


@dataclass(frozen=True)
class SweepFiles:
    """The files of one sweep's folder."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Path:
        """Hydra's configuration of the sweep, written when it starts."""
        return self.folder / "multirun.yaml"

    @property
    def plan(self) -> Path:
        """The jobs, written before the first one starts."""
        return self.folder / "plan.json"

    @property
    def table(self) -> Path:
        return self.folder / "table.md"

    def job(self, number: int) -> Path:
        """The record of the job that was launched with this number."""
        return self.folder / "jobs" / f"{number:04d}.json"

    def record(self, number: int, folder: Path | None, error: str | None) -> None:
        """Write how a job of the sweep ended, or at its start LOST: what stays if it is killed."""
        file = self.job(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"folder": str(folder) if folder else None, "error": error})

    def read_record(self, number: int) -> dict[str, Any] | None:
        """How a job ended; None before it starts, and where that couldn't be written."""
        file = self.job(number)
        return read_json(file) if is_json(file) else None


@dataclass(frozen=True)
class OutputFolder:
    """What `output` names: all that runs and sweeps write is below it."""

    folder: Path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    @property
    def statistics(self) -> Path:
        return self.folder / "statistics"

    @property
    def hidden(self) -> Path:
        return self.folder / "hidden"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @property
    def report(self) -> Path:
        """The HTML page about all runs."""
        return self.folder / "report.html"

    def runs(self) -> list[Path]:
        """The folders of its runs; where it has none of that name, those anywhere below it."""
        own = self.folder / "runs"
        if own.is_dir():
            return sorted(own.iterdir())
        name = RunFiles(self.folder).settings.name
        return sorted(file.parent for file in self.folder.rglob(name))

    def sweeps(self) -> Iterator[SweepFiles]:
        """Its sweeps that have a plan, oldest first, or the one that the folder itself is."""
        own = SweepFiles(self.folder)
        others = map(SweepFiles, sorted(self.folder.glob("sweeps/*")))
        yield from [own] if own.plan.exists() else (s for s in others if s.plan.exists())

    def lock(self, name: str) -> FileLock:
        """A lock between processes, by its name."""
        return FileLock(self._lock_file(name))

    def _lock_file(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"


def lock_of(folder: Path) -> FileLock:
    """The lock of a run's, or a checkpoint's, folder."""
    return OutputFolder(folder.parent.parent).lock(_lock_name(folder))


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the lock of a run's, or a checkpoint's, folder."""
    file = OutputFolder(folder.parent.parent)._lock_file(_lock_name(folder))
    if not file.exists():
        return False
    try:
        with FileLock(file).acquire(timeout=0):
            return False
    except Timeout:
        return True


def newer(file: Path, than: float) -> bool:
    """Whether the file was written at that time or later."""
    return file.exists() and file.stat().st_mtime >= than


def read_json(path: Path) -> Any:
    """The content of a JSON file; DamagedFileError where there is none in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoding or of the JSON
        raise DamagedFileError(path) from error


def is_json(path: Path) -> bool:
    """Whether the file is there and can be read."""
    try:
        read_json(path)
    except (FileNotFoundError, DamagedFileError):
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or as it was."""
    partial = partial_of(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _lock_name(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"
