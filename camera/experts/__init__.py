"""Modules that stand in for a layer's native experts once these are compressed."""

from camera.experts.ragged import RaggedExperts

__all__ = ["RaggedExperts"]
