"""Figures of a run's energies: their distribution, and how few micro-experts hold most of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import cm, colors
from matplotlib import pyplot as plt

from experiments.figures.style import GREY, ORDERED, STYLE, save
from experiments.records.energy_summary import Histogram


def draw_energies(histograms: dict[int, Histogram], file: Path) -> Path:
    """One row per layer: the share of its micro-experts at each power of ten of energy."""
    layers = sorted(histograms)
    edges = histograms[layers[0]].edges
    shares = np.array([_shares(histograms[layer]) for layer in layers])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, layers_height(layers)))
        rows = np.arange(len(layers) + 1) - 0.5
        mesh = axes.pcolormesh(edges, rows, 100 * shares, cmap=ORDERED, rasterized=True)
        axes.invert_yaxis()
        label_layers(axes, layers)
        axes.set(xlabel="log10 of the energy", ylabel="layer", title="Energy of micro-experts")
        figure.colorbar(mesh, label="% of the layer's micro-experts")
        zeros = [histograms[layer].zeros for layer in layers]
        if any(zeros):
            axes.text(
                1, 1.01, f"{sum(zeros):,} without energy", ha="right", transform=axes.transAxes
            )
        return save(figure, file)


def draw_energy_shares(percents: list[float], top: dict[int, list[float]], file: Path) -> Path:
    """One line per layer: the share (0 to 1) of its energy in its top `percents` micro-experts."""
    layers = sorted(top)
    colours = _line_colours(len(layers))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.8))
        for i, layer in enumerate(layers):
            axes.plot(percents, 100 * np.array(top[layer]), color=colours(i), linewidth=1)
        axes.plot(percents, percents, color=GREY, linestyle=":", linewidth=1)
        axes.annotate("if all were alike", (22, 24), color=GREY, ha="right")
        axes.grid(True)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(
            xlim=(percents[0], 100),
            ylim=(0, 101),
            xlabel="% of the layer's micro-experts, highest energy first",
            ylabel="% of the layer's energy",
            title="How much energy the top micro-experts hold",
        )
        _layer_bar(figure, axes, layers)
        return save(figure, file)


def _line_colours(count: int) -> colors.ListedColormap:
    # The light end of the map can't be seen on paper.
    return colors.ListedColormap(plt.get_cmap(ORDERED)(np.linspace(0, 0.85, count)))


def _layer_bar(figure: plt.Figure, axes: plt.Axes, layers: list[int]) -> None:
    edges = np.arange(len(layers) + 1) - 0.5
    bounds = colors.BoundaryNorm(edges, len(layers))
    scale = cm.ScalarMappable(bounds, _line_colours(len(layers)))
    step = max(1, len(layers) // 16)
    bar = figure.colorbar(scale, ax=axes, label="layer", ticks=range(0, len(layers), step))
    bar.ax.set_yticklabels([str(layer) for layer in layers[::step]])
    bar.ax.tick_params(length=0)


def _shares(histogram: Histogram) -> np.ndarray:
    total = histogram.counts.sum() + histogram.zeros
    return histogram.counts / max(total, 1)


def layers_height(layers: list[int]) -> float:
    """Inches of a figure with one row per layer."""
    return 1.4 + 0.22 * max(len(layers), 6)


def label_layers(axes: plt.Axes, layers: list[int]) -> None:
    """Number the rows of the y axis by layer, at most about sixteen of them."""
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
