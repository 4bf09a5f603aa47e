"""What a tracker can be told of a run or of a sweep; the one that keeps nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from camera.runtime.errors import CameraError
from experiments.records.failures import one_line

if TYPE_CHECKING:  # the configuration's types are made from this module, at every start
    import pandas as pd

    from experiments.records.energy_summary import Histogram

log = logging.getLogger("camera")


@dataclass(frozen=True)
class Result:
    """A file or folder that a run made: what it is, its name, and what is known of it.

    `stays` says that it isn't deleted once the run is done.
    """

    kind: str  # checkpoint, plan, statistics
    name: str
    path: Path
    about: dict[str, Any]
    stays: bool = True


class NullTracker:
    """Keeps nothing; also what every tracker can be told."""

    keeps: ClassVar[bool] = False  # whether it is worth to make for it what a run doesn't need

    def start(
        self,
        folder: Path,
        *,
        name: str,
        group: str | None,
        job_type: str,
        tags: Sequence[str],
        config: dict[str, Any],
    ) -> None:
        """Open a run with its files below `folder`; `group` is the sweep."""

    def log_layer(self, layer: int, measured: Mapping[str, float]) -> None:
        """Keep the numbers of a layer that is compressed."""

    def log_histograms(self, histograms: Mapping[int, Histogram]) -> None:
        """Keep the energies of each layer."""

    def log_figures(self, files: Sequence[Path]) -> None:
        """Keep images, by the names of their files."""

    def log(self, values: Mapping[str, float]) -> None:
        """Keep results, one number of a name, by slash-separated names."""

    def log_tables(self, tables: Mapping[str, pd.DataFrame]) -> None:
        """Keep tables, by name."""

    def log_curves(self, curves: pd.DataFrame, *, x: str, y: str, line: str, title: str) -> None:
        """Keep a plot: rows of x and y, a line for each value of the column `line`."""

    def log_page(self, page: Path) -> None:
        """Keep an HTML page."""

    def log_results(self, results: Sequence[Result], base: Mapping[str, Any]) -> None:
        """Keep what the run made, if asked to; `base` says of which model."""

    def log_text(self, file: Path) -> None:
        """Keep a text file: the run's log."""

    def finish(self) -> None:
        """Close the run as a success."""

    def fail(self, reason: str) -> None:
        """Close the run as failed; the next run starts afresh."""


class CarefulTracker:
    """Another tracker, told the same, whose failures are one warning: losing it loses no run.

    Only a CameraError of `start` is raised: what the user can mend before anything is done.
    """

    def __init__(self, tracker: NullTracker) -> None:
        self._tracker = tracker

    @property
    def keeps(self) -> bool:
        return self._tracker.keeps

    def __getattr__(self, what: str) -> Callable[..., None]:
        return partial(self._tell, what)

    def _tell(self, what: str, *args: Any, **about: Any) -> None:
        try:
            getattr(self._tracker, what)(*args, **about)
        except Exception as error:
            if what == "start" and isinstance(error, CameraError):
                raise
            name = type(self._tracker).__name__
            log.warning("%s is lost (%s): the run goes on without it.", name, one_line(error))
            self._tracker = NullTracker()
