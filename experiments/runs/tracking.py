"""A run as a tracker is told of it: while it happens, or later from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camera.runtime.files import CheckpointFiles
from experiments.records.energy_summary import read_energies
from experiments.records.files import COMPRESSION, RunFiles, read_json
from experiments.runs.summary import (
    layer_numbers,
    numbers_of,
    score_tables,
    scores_of,
    start_of,
)
from experiments.runs.tracker import CarefulTracker, NullTracker, Result

Tracker = NullTracker | CarefulTracker


class RunTracking:
    """Tells a tracker of one run; a run that is refused before it begins isn't opened at all.

    It hears of the layers from `camera.compress`, as its listener, or from its report.
    """

    def __init__(self, tracker: Tracker, files: RunFiles) -> None:
        self.tracker, self.files = tracker, files
        self._begun = False
        self._layers: set[int] = set()

    def begin(self) -> None:
        """Open the run, once."""
        if not self._begun:
            self.tracker.start(self.files.folder, **start_of(read_json(self.files.settings)))
            self._begun = True

    def layer(self, index: int, measured: Mapping[str, float]) -> None:
        """A layer is compressed; each is told once."""
        if index not in self._layers:
            self._layers.add(index)
            self.tracker.log_layer(index, layer_numbers(measured))

    def compressed(self, report: Mapping[str, Any]) -> None:
        """What the compression reports, where it was done before too."""
        self.begin()
        for index, measured in report.get("measured", {}).items():
            self.layer(int(index), measured)

    def figures(self, files: list[Path]) -> None:
        """The energies in the run's folder, and its figures."""
        if energies := read_energies(self.files.folder):
            self.tracker.log_histograms(energies.histograms)
        self.tracker.log_figures(files)

    def part(self, name: str, part: Mapping[str, Any]) -> None:
        """A measurement is done."""
        if scores := scores_of(name, part):
            self.tracker.log(scores)

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """The whole report, and what the run leaves."""
        self.tracker.log(numbers_of(metrics))
        self.tracker.log_tables(score_tables(metrics))
        self.tracker.log_results(*results_of(self.files))
        self.tracker.log_text(self.files.log)
        self.tracker.finish()

    def fail(self, reason: str) -> None:
        """It ends early; a careful tracker raises nothing here."""
        if self._begun:
            self.tracker.log_text(self.files.log)
            self.tracker.fail(reason)


def replay(tracker: Tracker, files: RunFiles) -> None:
    """Tell a tracker of a finished run from the files of its folder."""
    tracking = RunTracking(tracker, files)
    tracking.compressed(files.read_part(COMPRESSION) or {})
    tracking.figures(files.figures())
    tracking.finish(read_json(files.metrics))


def results_of(files: RunFiles) -> tuple[list[Result], dict[str, Any]]:
    """The checkpoint, plan and statistics of a run, as far as they are there; the base model."""
    stored, report = read_json(files.settings), files.read_part(COMPRESSION) or {}
    settings = stored["settings"]
    base = {
        "name": settings["model"]["name"],
        "source": report.get("model"),
        "revision": report.get("revision"),
    }
    if report.get("checkpoint") is None:
        return [], base
    checkpoint = Path(report["checkpoint"])
    about = {"method": stored["method"], **report["settings"], "bytes": report["bytes"]}
    paths = {
        "checkpoint": checkpoint,
        "plan": checkpoint / CheckpointFiles.PLAN,
        "statistics": checkpoint / CheckpointFiles.STATISTICS,
    }
    stays = settings["keep_checkpoint"]
    return [
        Result(kind, f"{checkpoint.name}-{kind}", path, about, stays)
        for kind, path in paths.items()
        if path.exists()
    ], base
