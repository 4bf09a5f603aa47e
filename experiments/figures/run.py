"""The figures of one run, in its folder, from the files there."""

from __future__ import annotations

from pathlib import Path

from experiments.figures.energies import draw_energies, draw_energy_shares
from experiments.figures.experts import draw_bits, draw_expert_energies, draw_widths
from experiments.records.energy_summary import read_energies
from experiments.records.files import COMPRESSION, RunFiles


def draw_run(folder: Path) -> list[Path]:
    """Draw the widths, bits and energies that the run recorded; the PNGs, PDFs beside them."""
    files = RunFiles(folder)
    drawn = []
    energies = read_energies(folder)
    if energies:
        drawn.append(draw_energies(energies.histograms, files.figure("energies")))
        drawn.append(
            draw_energy_shares(energies.percents, energies.top, files.figure("energy_shares"))
        )
        drawn.append(draw_expert_energies(energies.experts, files.figure("expert_energies")))
    compressed = files.read_part(COMPRESSION) or {}
    widths, full = compressed.get("widths", {}), compressed.get("full_widths", {})
    if any(width < full[path] for path, kept in widths.items() for width in kept):
        drawn.append(draw_widths(widths, full, files.figure("widths")))
    layers = compressed.get("layers", {}).values()
    bits = {path: mean for layer in layers for path, mean in layer.get("mean_bits", {}).items()}
    if bits:
        drawn.append(draw_bits(bits, files.figure("bits")))
    return drawn
