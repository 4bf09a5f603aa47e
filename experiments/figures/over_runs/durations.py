"""How long methods take at one ratio: statistics, then compression."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from experiments.figures.over_runs.bars import BAR
from experiments.figures.style import COLOURS, COLUMN, STYLE, canvas, legend, save
from experiments.figures.words import Heading
from experiments.tables.names.methods import display_name

PHASES = {"calibrate": "statistics", "compress": "compression"}


def draw_durations(seconds: pd.DataFrame, heading: Heading, file: Path) -> Path | None:
    """A bar for each row of method, label, calibrate, compress; None for fewer than two methods."""
    if seconds.empty or seconds["method"].nunique() < 2:
        return None
    ordered = seconds.assign(total=seconds[[*PHASES]].sum(axis=1)).sort_values("total")
    unit, name = (60, "minutes") if ordered["total"].max() >= 120 else (1, "seconds")
    with plt.rc_context(STYLE):
        figure, (axes,) = canvas(heading, COLUMN, 0.75 + BAR * len(ordered))
        rows, begun = np.arange(len(ordered)), np.zeros(len(ordered))
        for colour, (phase, label) in zip((COLOURS[1], COLOURS[5]), PHASES.items(), strict=True):
            taken = ordered[phase].to_numpy() / unit
            axes.barh(rows, taken, 0.68, begun, color=colour, label=label)
            begun = begun + taken
        for row, total in zip(rows, begun, strict=True):
            text = f"{total:.1f}"
            axes.annotate(text, (total, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(rows, [display_name(method) for method in ordered["method"]])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.15 * begun.max())
        axes.set_xlabel(name)
        legend(figure)
        return save(figure, file)
