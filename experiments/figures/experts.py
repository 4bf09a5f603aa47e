"""Maps of layer x expert: kept share, bits and energy of each expert."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib import colors
from matplotlib import pyplot as plt

from camera.moe.families import is_routed
from experiments.figures.energies import label_layers, layers_height
from experiments.figures.style import ABSENT, ORDERED, STYLE, save


def draw_widths(widths: dict[str, list[int]], full: dict[str, int], file: Path) -> Path:
    """Layer x expert: the share of its micro-experts that each expert keeps, shared ones as s."""
    shares = {path: [100 * width / full[path] for width in kept] for path, kept in widths.items()}
    label = "% of the expert's micro-experts"
    norm = colors.Normalize(0, 100)
    return _draw_experts(shares, norm, "Kept width of experts", label, file)


def draw_bits(bits: dict[str, list[float]], file: Path) -> Path:
    """Layer x expert: the mean bits of each expert's weights, without scales."""
    norm = colors.Normalize(0, _most(bits))
    return _draw_experts(bits, norm, "Bits of experts", "bits per weight", file)


def draw_expert_energies(energies: dict[str, list[float]], file: Path) -> Path:
    """Layer x expert: the share of the layer's energy that each expert's micro-experts hold."""
    totals: dict[int, float] = {}
    for path, values in energies.items():
        totals[layer_of(path)] = totals.get(layer_of(path), 0.0) + sum(values)
    shares = {
        path: [100 * value / (totals[layer_of(path)] or 1) for value in values]
        for path, values in energies.items()
    }
    norm = colors.PowerNorm(0.4, 0, _most(shares))  # a few experts hold most of it
    return _draw_experts(shares, norm, "Energy of experts", "% of the layer's energy", file)


def _draw_experts(
    values: dict[str, list[float]],
    norm: colors.Normalize,
    title: str,
    label: str,
    file: Path,
) -> Path:
    shared, routed = by_layer(values)
    layers = sorted(shared.keys() | routed.keys())
    s, r = (max(map(len, kept.values()), default=0) for kept in (shared, routed))
    grid = np.full((len(layers), s + r), np.nan)
    for row, layer in zip(grid, layers, strict=True):
        row[: len(shared.get(layer, []))] = shared.get(layer, [])
        row[s : s + len(routed.get(layer, []))] = routed.get(layer, [])
    with plt.rc_context(STYLE):
        size = (max(4.8, min(12.0, 2.4 + 0.12 * (s + r))), layers_height(layers))
        figure, axes = plt.subplots(figsize=size)
        colours = plt.get_cmap(ORDERED).with_extremes(bad=ABSENT)
        mesh = axes.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        if s and r:
            axes.axvline(s - 0.5, color="white", linewidth=3)
        step = max(1, -(-r // 16))
        experts = list(range(0, r, step))
        axes.set_xticks([*range(s), *(s + e for e in experts)], ["s"] * s + list(map(str, experts)))
        label_layers(axes, layers)
        axes.set(xlabel="expert", ylabel="layer", title=title)
        figure.colorbar(mesh, label=label)
        return save(figure, file)


def _most(values: dict[str, list[float]]) -> float:
    return max((value for row in values.values() for value in row), default=1)


def by_layer(
    values: dict[str, list[float]],
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """By layer the values of shared experts (and dense FFNs), and those of routed ones."""
    shared: dict[int, list[float]] = {}
    routed: dict[int, list[float]] = {}
    for path in sorted(values):
        kept = routed if is_routed(path) else shared
        kept.setdefault(layer_of(path), []).extend(values[path])
    return shared, routed


def layer_of(path: str) -> int:
    """The layer that a module path names by the first number in it; 0 where there is none."""
    number = re.search(r"\.(\d+)(\.|$)", path)
    return int(number.group(1)) if number else 0
