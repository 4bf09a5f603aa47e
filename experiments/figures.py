"""Figures of a run: a layer's distribution of energy, and what of each expert stays."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from experiments.histograms import Histogram

COLOURS = "cividis"  # ordered in grey and for colour-blind eyes too
ABSENT = "#d9d9d9"
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw_energies(histograms: dict[int, Histogram], file: Path) -> Path:
    """One row per layer: the share of its micro-experts at each power of ten of energy."""
    layers = sorted(histograms)
    edges = histograms[layers[0]].edges
    shares = np.array([_shares(histograms[layer]) for layer in layers])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, _height(layers)))
        rows = np.arange(len(layers) + 1) - 0.5
        mesh = axes.pcolormesh(edges, rows, 100 * shares, cmap=COLOURS, rasterized=True)
        axes.invert_yaxis()
        _label_layers(axes, layers)
        axes.set(xlabel="log10 of the energy", ylabel="layer", title="Energy of micro-experts")
        figure.colorbar(mesh, label="% of the layer's micro-experts")
        zeros = [histograms[layer].zeros for layer in layers]
        if any(zeros):
            axes.text(
                1, 1.01, f"{sum(zeros):,} without energy", ha="right", transform=axes.transAxes
            )
        return _save(figure, file)


def draw_widths(widths: dict[str, list[int]], full: dict[str, int], file: Path) -> Path:
    """Layer x expert: the share of its micro-experts that each expert keeps, shared ones as s."""
    shares = {path: [100 * width / full[path] for width in kept] for path, kept in widths.items()}
    label = "% of the expert's micro-experts"
    return _draw_experts(shares, 100, "Kept width of experts", label, file)


def draw_bits(bits: dict[str, list[float]], file: Path) -> Path:
    """Layer x expert: the mean bits of each expert's weights, without scales."""
    most = max((value for values in bits.values() for value in values), default=1)
    return _draw_experts(bits, most, "Bits of experts", "bits per weight", file)


def _draw_experts(
    values: dict[str, list[float]], most: float, title: str, label: str, file: Path
) -> Path:
    shared, routed = _by_layer(values)
    layers = sorted(shared.keys() | routed.keys())
    s, r = (max(map(len, kept.values()), default=0) for kept in (shared, routed))
    grid = np.full((len(layers), s + r), np.nan)
    for row, layer in zip(grid, layers, strict=True):
        row[: len(shared.get(layer, []))] = shared.get(layer, [])
        row[s : s + len(routed.get(layer, []))] = routed.get(layer, [])
    with plt.rc_context(STYLE):
        size = (max(4.8, min(12.0, 2.4 + 0.12 * (s + r))), _height(layers))
        figure, axes = plt.subplots(figsize=size)
        colours = plt.get_cmap(COLOURS).with_extremes(bad=ABSENT)
        mesh = axes.imshow(
            grid, cmap=colours, vmin=0, vmax=most, aspect="auto", interpolation="nearest"
        )
        if s and r:
            axes.axvline(s - 0.5, color="white", linewidth=3)
        step = max(1, -(-r // 16))
        experts = list(range(0, r, step))
        axes.set_xticks([*range(s), *(s + e for e in experts)], ["s"] * s + list(map(str, experts)))
        _label_layers(axes, layers)
        axes.set(xlabel="expert", ylabel="layer", title=title)
        figure.colorbar(mesh, label=label)
        return _save(figure, file)


def _shares(histogram: Histogram) -> np.ndarray:
    total = histogram.counts.sum() + histogram.zeros
    return histogram.counts / max(total, 1)


def _height(layers: list[int]) -> float:
    return 1.4 + 0.22 * max(len(layers), 6)


def _by_layer(
    values: dict[str, list[float]],
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """By layer the values of shared experts (and dense FFNs), and those of routed ones.

    A module path names its layer by the first number in it; routed experts end in "experts".
    """
    shared: dict[int, list[float]] = {}
    routed: dict[int, list[float]] = {}
    for path in sorted(values):
        number = re.search(r"\.(\d+)(\.|$)", path)
        kept = routed if path.endswith(".experts") else shared
        kept.setdefault(int(number.group(1)) if number else 0, []).extend(values[path])
    return shared, routed


def _label_layers(axes: plt.Axes, layers: list[int]) -> None:
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def _save(figure: plt.Figure, file: Path) -> Path:
    part = file.with_name(f".{file.name}")
    figure.savefig(part, format="png")
    plt.close(figure)
    part.replace(file)
    return file
