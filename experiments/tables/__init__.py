"""Runs as rows and tables."""
