"""Pruning of whole experts."""
