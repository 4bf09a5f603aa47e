"""Figures of a run's energies: their distribution, and how few micro-experts hold most of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import cm, colors, ticker
from matplotlib import pyplot as plt

from experiments.figures.over_layers.layers import LABELLED, label_layers, layers_height
from experiments.figures.style import (
    COLUMN,
    GREY,
    LINES,
    ORDERED,
    STYLE,
    canvas,
    legend,
    power_of_ten,
    save,
)
from experiments.figures.words import Heading
from experiments.records.energy_summary import Histogram


def draw_energies(histograms: dict[int, Histogram], words: str, file: Path) -> Path:
    """One row per layer: the share of its micro-experts at each power of ten of energy."""
    layers = sorted(histograms)
    edges = histograms[layers[0]].edges
    shares = 100 * np.array([_shares(histograms[layer]) for layer in layers])
    zeros = sum(histograms[layer].zeros for layer in layers)
    heading = Heading("Energy of micro-experts in each layer", words)
    with plt.rc_context(STYLE):
        figure, (axes,) = canvas(heading, COLUMN, layers_height(layers))
        rows = np.arange(len(layers) + 1) - 0.5
        some = np.ma.masked_equal(shares, 0)  # none at all is the paper, not the darkest colour
        mesh = axes.pcolormesh(edges, rows, some, cmap=ORDERED, vmin=0, rasterized=True)
        axes.invert_yaxis()
        label_layers(axes, layers)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(lambda power, _: power_of_ten(power))
        none = f"; {zeros:,} have none" if zeros else ""
        axes.set_xlabel(f"energy of a micro-expert{none}")
        figure.colorbar(mesh, label="% of the layer's micro-experts")
        return save(figure, file)


def draw_energy_shares(
    percents: list[float],
    top: dict[int, list[float]],
    sizes: dict[int, int],
    words: str,
    file: Path,
) -> Path:
    """One line per layer: the share (0 to 1) of its energy in its top `percents` micro-experts.

    `sizes` has the number of a layer's micro-experts: a line begins at one of them.
    """
    layers = sorted(top)
    colours = _line_colours(len(layers))
    heading = Heading("Share of energy in the top micro-experts", words)
    with plt.rc_context(STYLE):
        figure, (axes,) = canvas(heading, COLUMN, 2.5)
        for i, layer in enumerate(layers):
            known = np.array(percents) >= 100 / max(sizes[layer], 1)
            x, y = np.array(percents)[known], 100 * np.array(top[layer])[known]
            axes.plot(x, y, color=colours(i), linewidth=0.9)
        _frame(axes, percents)
        least, most = min(sizes.values()), max(sizes.values())
        count = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        if most > 1:
            axes.set_xlim(max(percents[0], 100 / most), 100)
        axes.set_xlabel(f"% of a layer's {count} micro-experts, highest first")
        _layer_bar(figure, axes, layers)
        return save(figure, file)


def draw_shares_by_alpha(
    percents: list[float], top: dict[float, list[float]], words: str, file: Path
) -> Path:
    """One line per α: the mean over layers of the share that the top `percents` % hold."""
    heading = Heading("Share of energy in the top micro-experts by α", words)
    colours = _line_colours(len(top))
    with plt.rc_context(STYLE):
        figure, (axes,) = canvas(heading, COLUMN, 2.6)
        for i, alpha in enumerate(sorted(top)):
            shares = 100 * np.array(top[alpha])
            line = LINES[i % len(LINES)]
            axes.plot(percents, shares, color=colours(i), linestyle=line, label=f"α = {alpha:g}")
        _frame(axes, percents)
        axes.set(
            xlabel="% of a layer's micro-experts, highest first",
            ylabel="% of the layer's energy (mean of layers)",
        )
        legend(figure)
        return save(figure, file)


def _frame(axes: plt.Axes, percents: list[float]) -> None:
    axes.plot(percents, percents, color=GREY, linestyle=":", linewidth=0.9)
    axes.annotate("all alike", (22, 20), color=GREY, ha="left", va="top", size=7)
    axes.grid(True)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlim=(percents[0], 100), ylim=(0, 101), ylabel="% of the layer's energy")


def _line_colours(count: int) -> colors.ListedColormap:
    # Neither end of the map can be seen on every page.
    return colors.ListedColormap(plt.get_cmap(ORDERED)(np.linspace(0.15, 0.85, count)))


def _layer_bar(figure: plt.Figure, axes: plt.Axes, layers: list[int]) -> None:
    edges = np.arange(len(layers) + 1) - 0.5
    bounds = colors.BoundaryNorm(edges, len(layers))
    scale = cm.ScalarMappable(bounds, _line_colours(len(layers)))
    step = max(1, -(-len(layers) // LABELLED))
    bar = figure.colorbar(scale, ax=axes, label="layer", ticks=range(0, len(layers), step))
    bar.ax.set_yticklabels([str(layer) for layer in layers[::step]])
    bar.ax.tick_params(length=0)


def _shares(histogram: Histogram) -> np.ndarray:
    return histogram.counts / max(size_of(histogram), 1)


def size_of(histogram: Histogram) -> int:
    """The number of micro-experts that it counts."""
    return int(histogram.counts.sum()) + histogram.zeros
