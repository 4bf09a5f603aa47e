"""Quantisation with other bit plans."""
