"""A measure of many runs against what they differ in, a line for each method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.transforms import ScaledTranslation

from experiments.figures.over_runs.points import Axis, Measure, Reference
from experiments.figures.over_runs.scale import honest_limits, set_limits
from experiments.figures.style import (
    COLUMN,
    DENSE,
    GREY,
    STYLE,
    Look,
    canvas,
    legend,
    looks,
    save,
    variant_of,
)
from experiments.figures.words import Heading

HEIGHT = 2.7
DODGE, MOST_DODGED = 1.8, 9.0  # points between lines side by side; of the outermost two


def draw_curves(
    points: pd.DataFrame,
    axis: Axis,
    measure: Measure,
    heading: Heading,
    reference: Reference | None,
    file: Path,
) -> Path:
    """Draw the points of `experiments.figures.over_runs.points`, and what they compare with."""
    styles = looks(points["method"])
    with plt.rc_context(STYLE):
        figure, (axes,) = canvas(heading, COLUMN, HEIGHT)
        axes.grid(True)
        lines = dict(list(points.groupby(["method", "variant"])))
        order = sorted(lines, key=lambda key: (list(styles).index(key[0]), key[1]))
        for key, aside in zip(order, _side_by_side(len(order)), strict=True):
            look = variant_of(styles[key[0]], key[1])
            _draw_line(axes, lines[key], look, aside, reference if axis.from_zero else None)
        if reference:
            _draw_reference(axes, reference, axis.from_zero)
        _scale_x(axes, axis, points)
        level = None if reference is None else reference.level
        errors = [*points["error"], np.nan if reference is None else reference.error]
        values = [*points["y"], points["y"].iloc[0] if level is None else level]
        set_limits(axes, honest_limits(values, errors, level), measure.log)
        axes.set(xlabel=axis.label, ylabel=measure.label)
        legend(figure)
        return save(figure, file)


def _side_by_side(count: int) -> list[float]:
    """How far each line stands aside, in points, so that equal ones are all seen."""
    most = min(DODGE * (count - 1), MOST_DODGED)
    return list(np.linspace(-most / 2, most / 2, count)) if count > 1 else [0.0]


def _draw_line(
    axes: plt.Axes, line: pd.DataFrame, look: Look, aside: float, start: Reference | None
) -> None:
    place = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    x, y = list(line["x"]), list(line["y"])
    if start:
        axes.plot([0, x[0]], [start.level, y[0]], color=look.colour, linewidth=0.6, alpha=0.6)
    axes.plot(
        x,
        y,
        color=look.colour,
        marker=look.marker,
        markerfacecolor=look.face,
        linestyle=look.line,
        label=line["label"].iloc[0],
        transform=place,
    )
    known = line[line["error"].notna()]
    axes.errorbar(
        known["x"],
        known["y"],
        yerr=known["error"],
        fmt="none",
        ecolor=look.colour,
        elinewidth=0.7,
        capsize=1.8,
        transform=place,
    )


def _draw_reference(axes: plt.Axes, reference: Reference, at_zero: bool) -> None:
    axes.axhline(reference.level, color=GREY, linewidth=0.9, zorder=1, label=reference.name)
    if at_zero:
        axes.errorbar(
            [0],
            [reference.level],
            yerr=None if np.isnan(reference.error) else [reference.error],
            fmt=DENSE.marker,
            color=GREY,
            markersize=4,
            elinewidth=0.7,
            capsize=1.8,
            zorder=3,
        )
    elif not np.isnan(reference.error):
        low, high = reference.level - reference.error, reference.level + reference.error
        axes.axhspan(low, high, color=GREY, alpha=0.12, linewidth=0, zorder=0)


def _scale_x(axes: plt.Axes, axis: Axis, points: pd.DataFrame) -> None:
    x = points["x"]
    if axis.log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(x.unique()))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(x.min() / 1.15, x.max() * 1.15)
        return
    low = 0.0 if axis.from_zero else x.min()
    half = max(x.max() - low, axis.least) / 2
    middle = (low + x.max()) / 2
    axes.set_xlim(middle - 1.1 * half, middle + 1.1 * half)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
