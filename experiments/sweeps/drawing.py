"""The figures of a finished sweep: those over its runs are drawn, and all are named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.records.files import OutputFolder, RunFiles, SweepFiles

if TYPE_CHECKING:
    import pandas as pd


def draw_sweep(sweep: SweepFiles, runs: pd.DataFrame) -> list[str]:
    """Draw what the sweep's runs show together, and say in a line each where figures are."""
    from experiments.figures.comparison import draw_comparisons

    folder = OutputFolder(sweep.folder).figures
    over = [file.stem for file in draw_comparisons(runs, folder)]
    own = [figures for path in runs["_path"] if (figures := RunFiles(Path(path)).figures())]
    lines = []
    if own:
        names = dict.fromkeys(file.stem for files in own for file in files)
        several = f"{len(own)} runs" if len(own) > 1 else "one run"
        lines.append(f"figures of {several}, in {own[0][0].parent.parent}: {', '.join(names)}")
    if over:
        lines.append(f"figures over the runs, in {folder}: {', '.join(over)}")
    return lines
