"""Axes that don't make a collapse of noise: how wide they are at least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

LEAST_SHARE = 0.05  # of the value in the middle, to either side
LEAST_ERRORS = 2  # standard errors, to either side
LOG_FROM = 3  # the largest as a multiple of the smallest, from which an axis is logarithmic
MARGIN = 0.04


def honest_limits(
    values: Sequence[float], errors: Sequence[float], level: float | None = None
) -> tuple[float, float]:
    """Limits that hold all values with their errors, at least ±5 % and ±2 standard errors wide.

    Both are counted from `level`, what the values are compared with, else from their middle; the
    standard error is the median of those known. An error may be NaN.
    """
    value, known = np.asarray(values, float), np.asarray(errors, float)
    error, known = np.nan_to_num(known), known[~np.isnan(known)]
    usual = float(np.median(known)) if len(known) else 0.0
    low, high = float((value - error).min()), float((value + error).max())
    if level is not None:
        low, high = min(low, level), max(high, level)
    middle = (low + high) / 2 if level is None else level
    half = max(LEAST_SHARE * abs(middle), LEAST_ERRORS * usual)
    return min(low, middle - half), max(high, middle + half)


def set_limits(axes: plt.Axes, limits: tuple[float, float], log: bool) -> None:
    """The limits of the y axis with a margin; logarithmic if asked and they span a factor of 3."""
    low, high = limits
    if log and low > 0 and high > LOG_FROM * low:
        margin = (high / low) ** MARGIN
        axes.set_ylim(low / margin, high * margin)
        log_scale(axes, "y")
        return
    margin = MARGIN * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))


def log_scale(axes: plt.Axes, which: Literal["x", "y"]) -> None:
    """A log axis whose ticks are plain numbers, also where it spans less than a power of ten."""
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    low, high = sorted(axis.get_view_interval())
    few = ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
    wide = ticker.LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,))
    axis.set_major_locator(wide if high > 12 * low else few)
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter("{x:,g}")
