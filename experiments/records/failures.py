"""Failures of runs: their one line, and the refusal of a run that failed before."""

from __future__ import annotations

from camera.runtime.errors import CameraError


class FailedBeforeError(CameraError):
    """A run of a sweep that failed the last time, and isn't tried again unless asked for."""


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, CameraError) else f"{type(error).__name__}: {text}".rstrip(": ")
    )
