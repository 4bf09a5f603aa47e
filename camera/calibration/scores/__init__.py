"""Scores that rank micro-experts, one file each with its statistics and observer."""
