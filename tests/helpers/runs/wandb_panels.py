"""Draws what W&B kept offline of a sweep, as its panels: `python -m tests.helpers.runs.wandb_panels
OUTPUT PNG` makes docs/figures/wandb.png from the output folder of one tracked sweep.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from experiments.records.files import OutputFolder
from tests.helpers.runs.offline_wandb import Kept, read_back

CURVES = ("layer/energy_removed", "layer/kept_share", "layer/seconds", "layer/memory_gb")
SUMMARY = ("perplexity/wikitext2", "perplexity/c4", "average", "size/gb")
COLOURS = ("#8a8f98", "#3b82d6", "#e0823d", "#3aa675", "#b04a8b")


def draw(output: Path, picture: Path) -> None:
    """Curves over the layer, the summary, the sweep's curve, its table, a histogram, an image."""
    folder = OutputFolder(output)
    runs = [kept for run in folder.runs() for kept in read_back(run)]
    runs.sort(key=lambda kept: kept.run.display_name)
    runs.sort(key=lambda kept: kept.run.job_type != "dense")
    (sweep,) = [kept for files in folder.sweeps() for kept in read_back(files.folder)]
    colour = {kept.run.display_name: COLOURS[i % len(COLOURS)] for i, kept in enumerate(runs)}
    ratios = {"height_ratios": [1, 1, 1.1, 0.7]}
    figure, axes = plt.subplots(4, 4, figsize=(12, 9.2), layout="constrained", gridspec_kw=ratios)
    figure.suptitle(f"project {sweep.run.project}, group {sweep.run.run_group}", x=0.01, ha="left")
    for axis, key in zip(axes[0], CURVES, strict=True):
        _curves(axis, key, runs, colour)
    for axis, key in zip(axes[1], SUMMARY, strict=True):
        _bars(axis, key, runs, colour)
    tracked = next(kept for kept in reversed(runs) if "energy/histogram.values" in kept.history)
    _histogram(axes[2, 0], tracked)
    _plots(axes[2, 1:3], sweep)
    _image(axes[2, 3], tracked, "figures/widths")
    grid = axes[3, 0].get_gridspec()
    for axis in axes[3]:
        axis.remove()
    _table(figure.add_subplot(grid[3, :]), sweep)
    handles = [plt.Line2D([], [], color=c, marker="o", label=name) for name, c in colour.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    figure.savefig(picture, dpi=90)
    plt.close(figure)
    with Image.open(picture) as drawn:
        small = drawn.convert("RGB").quantize(128)
    small.save(picture, optimize=True)


def _curves(axis: Any, key: str, runs: list[Kept], colour: dict[str, str]) -> None:
    for kept in runs:
        curve = kept.curve(key)
        name = kept.run.display_name
        axis.plot(list(curve), list(curve.values()), marker="o", ms=3, color=colour[name])
    axis.set(title=key, xlabel="layer")
    axis.set_ylim(0, 1.1 * axis.dataLim.ymax or 1)


def _bars(axis: Any, key: str, runs: list[Kept], colour: dict[str, str]) -> None:
    known = [kept for kept in runs if key in kept.summary]
    names = [kept.run.display_name for kept in known]
    values = [kept.summary[key] for kept in known]
    bars = axis.barh(names, values, color=[colour[name] for name in names])
    axis.bar_label(bars, fmt="%.4g", padding=2, fontsize=7)
    axis.set(title=key, xlim=(0, 1.2 * max(values, default=1)), xticks=[])
    axis.invert_yaxis()


def _histogram(axis: Any, kept: Kept) -> None:
    rows = [row for row in kept.rows if "energy/histogram.values" in row]
    counts = np.array([row["energy/histogram.values"] for row in rows])
    edges = rows[0]["energy/histogram.bins"]
    layers = np.array([row["layer"] for row in rows])
    steps = np.append(layers, layers[-1] + 1) - 0.5
    axis.pcolormesh(steps, edges, counts.T, cmap="Blues")
    axis.set(title=f"energy/histogram ({kept.run.display_name})", xlabel="layer")


def _plots(axes: Any, sweep: Kept) -> None:
    for axis, text in zip(axes, ("wikitext2", "c4"), strict=True):
        axis.set_title(f"curves/{text}_sparsity")
        if f"curves/{text}_sparsity_table.path" not in sweep.history:
            continue
        for method, rows in sweep.table(f"curves/{text}_sparsity_table").groupby("method"):
            axis.plot(rows["sparsity"], rows[text], marker="o", ms=3, label=method)
        axis.set(xlabel="sparsity in percent")
        axis.legend(frameon=False)


def _image(axis: Any, kept: Kept, key: str) -> None:
    axis.imshow(plt.imread(kept.file(key)))
    axis.set_title(f"{key} ({kept.run.display_name})")
    axis.axis("off")


def _table(axis: Any, sweep: Kept) -> None:
    table = sweep.table("tables/paper")
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in table.values]
    axis.axis("off")
    axis.set_title("tables/paper (the run of type sweep)")
    drawn = axis.table(cells, colLabels=list(table), loc="upper center", edges="horizontal")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)


if __name__ == "__main__":
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.titleweight": "bold"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
