"""Curves over the layers, one for routed and one for shared experts: kept share and energy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

from experiments.figures.over_layers.layers import by_layer
from experiments.figures.style import (
    COLOURS,
    COLUMN,
    MARKERS,
    STYLE,
    canvas,
    legend,
    power_of_ten,
    save,
)
from experiments.figures.words import Heading


def draw_kept(widths: dict[str, list[int]], full: dict[str, int], words: str, file: Path) -> Path:
    """The share of micro-experts that each layer keeps of its routed and of its shared experts."""
    kept = by_layer(widths)
    asked = by_layer({path: [full[path]] * len(row) for path, row in widths.items()})
    shares = [
        {layer: 100 * sum(row) / (sum(before[layer]) or 1) for layer, row in after.items()}
        for after, before in zip(kept, asked, strict=True)
    ]
    heading = Heading("Micro-experts kept in each layer", words)
    with plt.rc_context(STYLE):
        figure, axes = _over_layers(shares, heading)
        axes.set(ylabel="% of the micro-experts", ylim=(0, 103))
        return save(figure, file)


def draw_energy_of_kinds(energies: dict[str, list[float]], words: str, file: Path) -> Path:
    """The energy of all micro-experts of a layer, of its routed and of its shared experts."""
    sums = [{layer: sum(row) for layer, row in kind.items()} for kind in by_layer(energies)]
    heading = Heading("Energy of each layer", words)
    with plt.rc_context(STYLE):
        figure, axes = _over_layers(sums, heading)
        if all(value > 0 for kind in sums for value in kind.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: power_of_ten(np.log10(value)))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_ylabel("sum of energies")
        return save(figure, file)


def _over_layers(kinds: list[dict[int, float]], heading: Heading) -> tuple[plt.Figure, plt.Axes]:
    figure, (axes,) = canvas(heading, COLUMN, 2.2)
    shared, routed = kinds
    for number, (label, values) in enumerate((("routed", routed), ("shared", shared))):
        if values:
            layers = sorted(values)
            few = len(layers) <= 32
            axes.plot(
                layers,
                [values[layer] for layer in layers],
                color=COLOURS[1 - number],
                marker=MARKERS[number] if few else "",
                linestyle="-" if number == 0 else "--",
                label=f"{label} experts",
            )
    axes.grid(True)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    axes.set_xlabel("layer")
    legend(figure)
    return figure, axes
