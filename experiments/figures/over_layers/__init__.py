"""Figures of one run over the layers of its model: energies, widths and bits."""
