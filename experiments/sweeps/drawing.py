"""The figures of a finished sweep: those over its runs are drawn, and all are named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments.records.failures import one_line
from experiments.records.files import OutputFolder, RunFiles, SweepFiles

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("camera")


class SweepFigures(NamedTuple):
    """The figures over a sweep's runs, and a line for each place where figures are."""

    over_runs: list[Path]
    lines: list[str]


def draw_sweep(sweep: SweepFiles, runs: pd.DataFrame) -> SweepFigures:
    """Draw what the sweep's runs show together, and say in a line each where figures are."""
    folder = OutputFolder(sweep.folder).figures
    over = _over_runs(runs, folder)
    own = [figures for path in runs["_path"] if (figures := RunFiles(Path(path)).figures())]
    lines = []
    if own:
        names = dict.fromkeys(file.stem for files in own for file in files)
        several = f"{len(own)} runs" if len(own) > 1 else "one run"
        lines.append(f"figures of {several}, in {own[0][0].parent.parent}: {', '.join(names)}")
    if over:
        stems = ", ".join(file.stem for file in over)
        lines.append(f"figures over the runs, in {folder}: {stems}")
    return SweepFigures(over, lines)


def _over_runs(runs: pd.DataFrame, folder: Path) -> list[Path]:
    from experiments.figures.comparison import draw_comparisons

    try:
        return draw_comparisons(runs, folder)
    except Exception as error:  # a font, a backend: they can be drawn again
        log.warning("The figures over the runs can't be drawn: %s", one_line(error))
        return []
