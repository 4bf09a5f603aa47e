"""Figures, each from run folders alone, as PNG and PDF: `python -m experiments.figures DIR`."""

from experiments.figures.energies import draw_energies
from experiments.figures.experts import draw_bits, draw_widths
from experiments.figures.run import draw_run

__all__ = ["draw_bits", "draw_energies", "draw_run", "draw_widths"]
