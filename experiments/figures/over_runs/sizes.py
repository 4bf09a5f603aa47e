"""A measure against bytes, and the front of the runs that nothing smaller beats."""

from __future__ import annotations

from math import hypot
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker

from experiments.figures.over_runs.points import Measure, errors_of, ratio_of
from experiments.figures.over_runs.scale import honest_limits, set_limits
from experiments.figures.style import COLUMN, GREY, STYLE, canvas, legend, looks, save
from experiments.figures.words import Heading
from experiments.tables.names.methods import display_name

HEIGHT = 2.8
ALIKE = 1.02  # times the size
ROOM = 18, 7  # points that the name of a ratio takes, across and down


def front(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `mb`, `y`, `error` that beat all smaller ones, from small to large.

    To beat is to be better (`better`: 1 if more is, -1 if less) by more than both errors combined.
    """
    ordered = rows.sort_values("mb", kind="stable")
    ordered = ordered.iloc[np.lexsort((-ordered["better"] * ordered["y"], ordered["mb"]))]
    kept: list[int] = []
    for place, row in enumerate(ordered.itertuples()):
        last = ordered.iloc[kept[-1]] if kept else None
        if last is None or row.better * (row.y - last["y"]) > _both(row.error, last["error"]):
            kept.append(place)
    return ordered.iloc[kept]


def _both(one: float, other: float) -> float:
    return hypot(*np.nan_to_num([one, other]))


def draw_sizes(rows: pd.DataFrame, measure: Measure, heading: Heading, file: Path) -> Path | None:
    """Every run by its `size_mb` and the measure; None, and no file, for fewer than two sizes."""
    if not {"size_mb", measure.column} <= {*rows.columns}:
        return None
    rows = rows[rows["size_mb"].notna() & rows[measure.column].notna()]
    compressed = rows.loc[rows["method"] != "dense", "size_mb"]
    if compressed.empty or compressed.max() < ALIKE * compressed.min():
        return None
    found = pd.DataFrame(
        {
            "mb": rows["size_mb"],
            "y": rows[measure.column].astype(float),
            "error": errors_of(rows, measure),
            "better": -1 if measure.log else 1,
            "method": rows["method"],
            "ratio": [ratio_of(row) for row in rows.to_dict("records")],
        }
    )
    unit, name = (1000, "GB") if found["mb"].max() >= 2000 else (1, "MB")
    found = found.assign(size=found["mb"] / unit)
    with plt.rc_context(STYLE):
        figure, (axes,) = canvas(heading, COLUMN, HEIGHT)
        axes.grid(True)
        best = front(found)
        axes.step(
            [*best["size"], found["size"].max()],
            [*best["y"], best["y"].iloc[-1]],
            where="post",
            color=GREY,
            linewidth=0.9,
            zorder=1,
            label="best for its size",
        )
        for method, look in looks(found["method"]).items():
            own = found[found["method"] == method]
            axes.errorbar(
                own["size"],
                own["y"],
                yerr=own["error"],
                marker=look.marker,
                linestyle="none",
                color=look.colour,
                markersize=4.5,
                elinewidth=0.6,
                capsize=1.5,
                label=display_name(method),
            )
        axes.set_xlim(0, 1.06 * found["size"].max())
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        dense = found.loc[found["method"] == "dense", "y"]
        level = float(dense.iloc[0]) if len(dense) else None
        limits = honest_limits(list(found["y"]), list(found["error"]), level)
        set_limits(axes, limits, measure.log)
        _name_ratios(axes, found[found["ratio"] != ""])
        axes.set(xlabel=f"{name} of weights", ylabel=measure.label)
        legend(figure)
        return save(figure, file)


def _name_ratios(axes: plt.Axes, found: pd.DataFrame) -> None:
    """Each point's ratio beside it, where the one of another point isn't in the way."""
    taken: list[np.ndarray] = []
    for point in found.itertuples():
        corner = axes.transData.transform((point.size, point.y)) * 72 / axes.figure.dpi
        if all((np.abs(corner - other) > ROOM).any() for other in taken):
            taken.append(corner)
            by = {"xytext": (4, 2), "textcoords": "offset points"}
            axes.annotate(point.ratio, (point.size, point.y), size=6, color=GREY, **by)
