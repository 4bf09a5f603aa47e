"""The figures of one run, in its folder, from the files there."""

from __future__ import annotations

from pathlib import Path

from experiments.figures.energies import draw_energies, draw_energy_shares
from experiments.figures.experts import draw_bits, draw_expert_energies, draw_widths
from experiments.records.energy_summary import read_energies
from experiments.records.folders import read_json


def draw_run(folder: Path) -> list[Path]:
    """Draw what the run's compress.json and energies.json have to show; the PNGs, PDFs beside."""
    drawn = []
    energies = read_energies(folder)
    if energies:
        drawn.append(draw_energies(energies.histograms, folder / "energies.png"))
        drawn.append(
            draw_energy_shares(energies.percents, energies.top, folder / "energy_shares.png")
        )
        drawn.append(draw_expert_energies(energies.experts, folder / "expert_energies.png"))
    report = folder / "compress.json"
    compressed = read_json(report) if report.exists() else {}
    widths, full = compressed.get("widths", {}), compressed.get("full_widths", {})
    if any(width < full[path] for path, kept in widths.items() for width in kept):
        drawn.append(draw_widths(widths, full, folder / "widths.png"))
    layers = compressed.get("layers", {}).values()
    bits = {path: mean for layer in layers for path, mean in layer.get("mean_bits", {}).items()}
    if bits:
        drawn.append(draw_bits(bits, folder / "bits.png"))
    return drawn
