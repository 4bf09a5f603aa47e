"""Micro-experts ranked by other scores."""
