"""Checkpoints that other tools quantised, read as plain tensors: one file a format."""
