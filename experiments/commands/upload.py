"""`camera wandb DIR`: finished runs and sweeps to W&B, those without a tracker too.

What W&B kept offline is uploaded as it is; a run that W&B wasn't told of is told from its files.
Interrupted attempts that another one went on from are left out, and so is what isn't finished or
was uploaded before. With WANDB_MODE=offline nothing is uploaded: what W&B wasn't told of is kept
offline beside its run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from camera.runtime.errors import CameraError
from experiments.config.location import add_output_folder
from experiments.records.failures import NoRunsError
from experiments.records.files import OutputFolder, RunFiles, SweepFiles

UPLOADED, KEPT, BEFORE, OPEN = "uploaded", "kept offline", "uploaded before", "not finished"


def main(arguments: list[str]) -> int:
    """Upload what is finished below a folder, and say how much that was."""
    parser = argparse.ArgumentParser(prog="camera wandb", description=__doc__)
    add_output_folder(parser)
    parser.add_argument("--project", default="camera", help="of what W&B wasn't told of yet")
    parser.add_argument("--entity", help="team or user (default: that of the account)")
    asked = parser.parse_args(arguments)
    upload = Upload(asked.project, asked.entity)
    try:
        counts = upload.all_of(OutputFolder(asked.folder))
    except CameraError as error:
        print(error, file=sys.stderr)
        return 1
    print(", ".join(f"{number} {what}" for what, number in counts.items()))
    return 0


class Upload:
    """Uploads to a project, or with WANDB_MODE=offline keeps beside each run what is to come."""

    def __init__(self, project: str, entity: str | None = None) -> None:
        self.offline = os.environ.get("WANDB_MODE") == "offline"
        self.project, self.entity = project, entity

    def all_of(self, output: OutputFolder) -> Counter[str]:
        """Every finished run, then every sweep; how many became what."""
        runs = [files for files in map(RunFiles, output.runs()) if files.is_run]
        if not runs:
            raise NoRunsError(output.folder)
        counts = Counter(self._run(files) for files in runs)
        for sweep in output.sweeps():
            counts[self._sweep(sweep, output)] += 1
        return counts

    def _run(self, files: RunFiles) -> str:
        from experiments.runs.tracking import replay

        if not files.is_done:
            return OPEN
        return self._send(files.folder, lambda tracker: replay(tracker, files))

    def _sweep(self, sweep: SweepFiles, output: OutputFolder) -> str:
        from experiments.sweeps.jobs import read_plan
        from experiments.sweeps.tracking import preset_of_sweep, track_sweep
        from experiments.tables.rows import read_runs, with_dense_rows

        names = [job.run.name for job in read_plan(sweep.folder) if job.run is not None]
        if not all(RunFiles(output.run(name)).is_done for name in names):
            return OPEN
        runs = with_dense_rows(read_runs(output.runs()), names)
        preset = preset_of_sweep(sweep)
        return self._send(sweep.folder, lambda tracker: track_sweep(tracker, sweep, preset, runs))

    def _send(self, folder: Path, tell: Callable) -> str:
        from experiments.runs import wandb_files
        from experiments.runs.wandb_tracker import WandbTracker

        if wandb_files.is_tracked(folder):
            unsent = wandb_files.unsent(folder)
            for kept in unsent if not self.offline else ():
                _sync(kept, self.entity)
            return BEFORE if not unsent else KEPT if self.offline else UPLOADED
        tell(WandbTracker("offline" if self.offline else "online", self.project, self.entity))
        return KEPT if self.offline else UPLOADED


def _sync(kept: Path, entity: str | None) -> None:
    """`wandb sync` of one folder; CameraError with its last words where it fails."""
    team = ["--entity", entity] if entity else []
    command = [sys.executable, "-m", "wandb", "sync", *team, str(kept)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise CameraError(f"{kept} can't be uploaded ({said[-1]}): run `wandb login`, then again.")
