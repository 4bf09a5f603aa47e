"""Grids, GPTQ and bit plans."""
