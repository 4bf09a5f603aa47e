"""A measure of methods at the one ratio that was asked of all: a bar for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from experiments.figures.over_runs.points import Measure, Reference
from experiments.figures.over_runs.scale import log_scale
from experiments.figures.style import COLUMN, GREY, INK, STYLE, canvas, looks, save
from experiments.figures.words import Heading

BAR = 0.17  # inches of a bar and the room around it
LOG_FROM = 8  # the largest as a multiple of the smallest, from which bars are logarithmic


def draw_bars(
    points: pd.DataFrame,
    measure: Measure,
    heading: Heading,
    reference: Reference | None,
    file: Path,
) -> Path:
    """Draw the points, the best first, from where the measure begins, with their numbers."""
    ordered = points.sort_values("y", ascending=measure.log, kind="stable")
    styles = looks(points["method"])
    with plt.rc_context(STYLE):
        figure, (axes,) = canvas(heading, COLUMN, 0.55 + BAR * (len(ordered) + bool(reference)))
        values, errors = list(ordered["y"]), list(ordered["error"])
        names = list(ordered["label"])
        colours = [styles[method].colour for method in ordered["method"]]
        if reference:
            values, errors = [reference.level, *values], [reference.error, *errors]
            names, colours = [reference.name, *names], [GREY, *colours]
            axes.axvline(reference.level, color=GREY, linewidth=0.9, zorder=3)
        rows = np.arange(len(values))
        known = np.nan_to_num(np.array(errors, float))
        if measure.log and max(values) > LOG_FROM * min(values):
            axes.set_xlim(measure.least, max(values))
            log_scale(axes, "x")
        axes.barh(rows, np.array(values) - measure.least, 0.68, measure.least, color=colours)
        some = known > 0
        axes.errorbar(
            np.array(values)[some],
            rows[some],
            xerr=known[some],
            fmt="none",
            ecolor=INK,
            elinewidth=0.8,
            capsize=1.8,
        )
        ends = np.array(values) + known
        for row, value, error, end in zip(rows, values, known, ends, strict=True):
            text = measure.text(value) + (f" ± {measure.text(error)}" if error else "")
            axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center", size=7)
        room = 1.4 if known.any() else 1.25
        if axes.get_xscale() == "log":
            axes.set_xlim(measure.least, ends.max() * (ends.max() / measure.least) ** (room - 1))
        else:
            axes.set_xlim(measure.least, measure.least + (ends.max() - measure.least) * room)
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(measure.label)
        return save(figure, file)
