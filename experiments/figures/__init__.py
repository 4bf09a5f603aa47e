"""Figures, each from run folders alone: PNG, PDF and SVG. `python -m experiments.figures DIR`."""

from experiments.figures.run import draw_run

__all__ = ["draw_run"]
