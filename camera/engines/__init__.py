"""Checkpoints as other programs read them: native ones, GGUF, compressed-tensors."""
