"""A measure of many runs against what they differ in, a line for each method."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker

from experiments.figures.points import Axis, Measure
from experiments.figures.style import GREY, LINES, STYLE, MethodStyle, method_styles, save

SIZE = (5.6, 4.2)
LEGEND_LINES, LEGEND_LINE = 2, 0.17  # lines of a legend that there is room for; inches of one more


def draw_curves(
    points: pd.DataFrame,
    axis: Axis,
    measure: Measure,
    title: str,
    file: Path,
    reference: tuple[str, float] | None = None,
) -> Path:
    """Draw the points of `experiments.figures.points`, and what they compare with as a level."""
    styles = method_styles(points["method"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE)
        axes.grid(True)
        if reference:
            name, level = reference
            axes.axhline(level, color=GREY, linewidth=1, label=name, zorder=1)
        lines = dict(list(points.groupby(["method", "variant"])))
        for method, variant in sorted(lines, key=lambda key: (list(styles).index(key[0]), key[1])):
            _draw_line(axes, lines[method, variant], styles[method], LINES[variant % len(LINES)])
        if axis.log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(points["x"].unique()))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        if measure.log:
            log_scale(axes, "y")
        axes.set(xlabel=axis.label, ylabel=measure.label, title=title)
        legend(figure)
        return save(figure, file)


def _draw_line(axes: plt.Axes, line: pd.DataFrame, style: MethodStyle, linestyle: str) -> None:
    axes.plot(
        line["x"],
        line["y"],
        color=style.colour,
        marker=style.marker,
        linestyle=linestyle,
        label=line["label"].iloc[0],
    )
    known = line[line["error"].notna()]
    axes.errorbar(
        known["x"],
        known["y"],
        yerr=known["error"],
        fmt="none",
        ecolor=style.colour,
        elinewidth=0.7,
        capsize=2,
    )


def log_scale(axes: plt.Axes, which: Literal["x", "y"]) -> None:
    """A log axis whose ticks are plain numbers, also where it spans less than a power of ten."""
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    low, high = sorted(axis.get_view_interval())
    few = ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if high > 12 * low else few)
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter("{x:g}")


def legend(figure: plt.Figure) -> None:
    """Below the figure, so that it hides nothing, in as many columns as labels leave room for.

    The figure grows with it, so that what it shows keeps its size.
    """
    handles, labels = figure.axes[0].get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = max(1, min(4, 80 // (longest + 6)))
    lines = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * max(lines - LEGEND_LINES, 0))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
