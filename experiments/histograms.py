"""Energies as histograms over powers of ten: what the figures draw and the tracker keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from camera.statistics import Statistics

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """How many micro-experts of a layer have which log10 energy; zeros are counted apart."""

    counts: np.ndarray
    edges: np.ndarray
    zeros: int


def energy_histograms(statistics: Statistics, alpha: float) -> dict[int, Histogram]:
    """A histogram for each layer of known energy, over one range so that layers compare."""
    values = {
        index: layer.energy(alpha).double().cpu().numpy()
        for index, layer in statistics.layers.items()
        if hasattr(layer, "energy")
    }
    logs = {layer: np.log10(v[v > 0]) for layer, v in values.items()}
    everything = np.concatenate([*logs.values(), np.empty(0)])
    low, high = (everything.min(), everything.max()) if everything.size else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    return {
        layer: Histogram(
            np.histogram(logs[layer], edges)[0], edges, int((values[layer] <= 0).sum())
        )
        for layer in sorted(values)
    }
