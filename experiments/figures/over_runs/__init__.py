"""Figures over many runs: what was measured against what runs differ in."""
