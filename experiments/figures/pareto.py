"""Accuracy against bytes, and the front of the runs that nothing smaller beats."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt

from experiments.figures.curves import SIZE, legend, log_scale
from experiments.figures.style import GREY, STYLE, method_styles, save


def pareto_front(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row of the same or a smaller `size_mb` beats, from small to large."""
    ordered = rows.sort_values(["size_mb", "average"], ascending=[True, False])
    best_before = ordered["average"].astype(float).cummax().shift(fill_value=-float("inf"))
    return ordered[ordered["average"] > best_before]


def draw_pareto(rows: pd.DataFrame, title: str, file: Path) -> Path | None:
    """Every run by its `size_mb` and `average`; None, and no file, for fewer than two sizes."""
    if not {"size_mb", "average"} <= {*rows.columns}:
        return None
    rows = rows[rows["size_mb"].notna() & rows["average"].notna()]
    if rows["size_mb"].nunique() < 2:
        return None
    front = pareto_front(rows)
    styles = method_styles(rows["method"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE)
        axes.grid(True)
        sizes, averages = [*front["size_mb"], rows["size_mb"].max()], [*front["average"]]
        axes.step(
            sizes,
            [*averages, averages[-1]],
            where="post",
            color=GREY,
            linewidth=1,
            zorder=1,
            label="Pareto front",
        )
        for method, style in styles.items():
            own = rows[rows["method"] == method]
            axes.scatter(
                own["size_mb"],
                own["average"],
                color=style.colour,
                marker=style.marker,
                s=26,
                linewidths=0.8,
                label=method,
            )
        log_scale(axes, "x")
        axes.set(xlabel="MB of weights", ylabel="average of the tasks, %", title=title)
        legend(figure)
        return save(figure, file)
