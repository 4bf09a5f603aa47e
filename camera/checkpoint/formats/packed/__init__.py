"""Modules whose matrices are packed to a few bits per weight."""
