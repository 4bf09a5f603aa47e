"""Bits by layer, by measured errors."""
