"""Maps of layer x expert: kept share, bits and energy of each expert."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colors
from matplotlib import pyplot as plt

from experiments.figures.over_layers.layers import (
    LABELLED,
    by_layer,
    label_layers,
    layer_of,
    layers_height,
)
from experiments.figures.style import ABSENT, COLUMN, ORDERED, PAGE, PAPER, STYLE, canvas, save
from experiments.figures.words import Heading

WIDE = 40  # experts: a map of more is as wide as a page


def draw_widths(widths: dict[str, list[int]], full: dict[str, int], words: str, file: Path) -> Path:
    """Layer x expert: the share of its micro-experts that each expert keeps, shared ones as s."""
    shares = {path: [100 * width / full[path] for width in kept] for path, kept in widths.items()}
    heading = Heading("Micro-experts that each expert keeps", words)
    return _draw_experts(shares, colors.Normalize(0, 100), heading, "% kept", file)


def draw_bits(bits: dict[str, list[float]], words: str, file: Path) -> Path:
    """Layer x expert: the mean bits of each expert's weights, without scales."""
    heading = Heading("Bits of each expert", words)
    return _draw_experts(bits, colors.Normalize(0, _most(bits)), heading, "bits per weight", file)


def draw_expert_energies(energies: dict[str, list[float]], words: str, file: Path) -> Path:
    """Layer x expert: the share of the layer's energy that each expert's micro-experts hold."""
    totals: dict[int, float] = {}
    for path, values in energies.items():
        totals[layer_of(path)] = totals.get(layer_of(path), 0.0) + sum(values)
    shares = {
        path: [100 * value / (totals[layer_of(path)] or 1) for value in values]
        for path, values in energies.items()
    }
    norm = colors.PowerNorm(0.4, 0, _most(shares))  # a few experts hold most of it
    heading = Heading("Energy of each expert", words)
    label = "% of the layer's energy,\nscale stretched at the low end"
    return _draw_experts(shares, norm, heading, label, file)


def _draw_experts(
    values: dict[str, list[float]],
    norm: colors.Normalize,
    heading: Heading,
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
        width = COLUMN if s + r <= WIDE else PAGE
        figure, (axes,) = canvas(heading, width, layers_height(layers))
        colours = plt.get_cmap(ORDERED).with_extremes(bad=ABSENT)
        mesh = axes.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        if s and r:
            axes.axvline(s - 0.5, color=PAPER, linewidth=2)
        step = max(1, -(-r // (LABELLED if width == PAGE else LABELLED // 2)))
        first = step if s and step > 1 else 0  # the 0 has no room beside the s
        experts = list(range(first, r, step))
        axes.set_xticks([*range(s), *(s + e for e in experts)], ["s"] * s + list(map(str, experts)))
        label_layers(axes, layers)
        axes.set_xlabel("expert (s: shared by all tokens)" if s and r else "expert")
        figure.colorbar(mesh, label=label, ticks=_even(norm))
        return save(figure, file)


def _even(norm: colors.Normalize) -> list[float] | None:
    """Ticks of a stretched scale at about even distances; None where the scale is even itself."""
    if not isinstance(norm, colors.PowerNorm):
        return None
    places = norm.inverse(np.linspace(0, 1, 5))
    return [float(f"{place:.1g}") for place in places]


def _most(values: dict[str, list[float]]) -> float:
    return max((value for row in values.values() for value in row), default=1)
