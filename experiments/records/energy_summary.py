"""Summary of a run's energies: energies.json in its folder, which outlives the checkpoint.

A histogram over powers of ten for each layer, the share of energy in its top micro-experts, and
the energy of each expert: what the figures draw and the tracker keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from camera.runtime.files import write_json
from experiments.records.files import RunFiles, is_json, read_json

if TYPE_CHECKING:
    from camera.calibration.statistics import Statistics

BINS = 64
PERCENTS = np.geomspace(0.1, 100, 121)  # of the micro-experts: a few hold most of the energy


@dataclass(frozen=True)
class Histogram:
    """How many micro-experts of a layer have which log10 energy; zeros are counted apart."""

    counts: np.ndarray
    edges: np.ndarray
    zeros: int


@dataclass(frozen=True)
class Energies:
    """By layer the histogram, and the share of energy (0 to 1) in its top `percents` %.

    `experts` has by module path the summed energy of each expert, `alpha` is that of the energies.
    """

    alpha: float
    histograms: dict[int, Histogram]
    percents: list[float]
    top: dict[int, list[float]]
    experts: dict[str, list[float]]


def keep_energies(statistics: Path, alpha: float, folder: Path) -> None:
    """Write energies.json to the folder from a file of statistics, if those know energies."""
    from camera.calibration.statistics import Statistics

    layers = _energies(Statistics.load(statistics), alpha)
    if not layers:
        return
    histograms = _histograms({layer: values for layer, (_, values) in layers.items()})
    edges = next(iter(histograms.values())).edges
    kept: dict[str, Any] = {"alpha": alpha, "edges": edges.tolist(), "percents": PERCENTS.tolist()}
    kept["layers"] = {
        str(layer): {
            "counts": histograms[layer].counts.tolist(),
            "zeros": histograms[layer].zeros,
            "top": [round(share, 6) for share in top_shares(values).tolist()],
            "experts": _expert_sums(groups, values),
        }
        for layer, (groups, values) in layers.items()
    }
    write_json(RunFiles(folder).energies, kept)


def read_energies(folder: Path) -> Energies | None:
    """What `keep_energies` wrote to a run's folder; None where it wrote nothing readable."""
    file = RunFiles(folder).energies
    if not is_json(file):
        return None
    kept = read_json(file)
    edges, layers = np.array(kept["edges"]), kept["layers"]
    return Energies(
        kept["alpha"],
        {int(i): Histogram(np.array(la["counts"]), edges, la["zeros"]) for i, la in layers.items()},
        kept["percents"],
        {int(i): layer["top"] for i, layer in layers.items()},
        {path: sums for layer in layers.values() for path, sums in layer["experts"].items()},
    )


def top_shares(energy_N: np.ndarray, percents: np.ndarray = PERCENTS) -> np.ndarray:
    """The share (0 to 1) of all energy that each top percentage of N micro-experts holds.

    Between two micro-experts it is interpolated; without any energy it is 0 throughout.
    """
    held = np.concatenate([[0.0], np.sort(energy_N)[::-1].cumsum()])
    return np.interp(percents / 100, np.linspace(0, 1, len(held)), held) / (held[-1] or 1)


def _energies(
    statistics: Statistics, alpha: float
) -> dict[int, tuple[dict[str, list[int]], np.ndarray]]:
    """By layer of known energy: widths of its experts by module path, energy of its pool."""
    return {
        index: (layer.groups, layer.energy(alpha).double().cpu().numpy())
        for index, layer in statistics
        if hasattr(layer, "energy")
    }


def _histograms(values: dict[int, np.ndarray]) -> dict[int, Histogram]:
    logs = {layer: np.log10(v[v > 0]) for layer, v in values.items()}
    everything = np.concatenate([*logs.values(), np.empty(0)])
    low, high = (everything.min(), everything.max()) if everything.size else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    return {
        layer: Histogram(np.histogram(logs[layer], edges)[0], edges, int((v <= 0).sum()))
        for layer, v in values.items()
    }


def _expert_sums(groups: dict[str, list[int]], energy_N: np.ndarray) -> dict[str, list[float]]:
    paths = [path for path, widths in groups.items() for _ in widths]
    starts = np.cumsum([0, *(width for widths in groups.values() for width in widths)])
    sums: dict[str, list[float]] = {path: [] for path in groups}
    for path, start, end in zip(paths, starts, starts[1:], strict=False):
        sums[path].append(float(energy_N[start:end].sum()))
    return sums
