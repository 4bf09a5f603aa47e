"""Why a run failed: error.txt."""

from __future__ import annotations

from pathlib import Path

from camera.runtime.errors import CameraError

# A user who presses Ctrl+C, a queue that takes a job off: no reason not to go on.
INTERRUPTIONS = ("KeyboardInterrupt", "SystemExit")


def failure(run: Path) -> str | None:
    """Why a run failed; None where it didn't, or was interrupted, and would go on."""
    file = run / "error.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return lines[0] if lines and not lines[0].startswith(INTERRUPTIONS) else None


def sentence(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, CameraError) else f"{type(error).__name__}: {text}".rstrip(": ")
    )
