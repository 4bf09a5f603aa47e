"""What a checkpoint is that is measured as it stands: of a compressed one, what made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camera.runtime.files import CheckpointFiles
from experiments.records.files import is_json, read_json

RATIO = ("sparsity", "sparsity_of", "bits")


def report_of(model: Path) -> dict[str, Any] | None:
    """The camera.json of a compressed checkpoint; None of any other model."""
    file = model / CheckpointFiles.REPORT
    return read_json(file) if is_json(file) else None


def origin_of(model: Path) -> dict[str, Any] | None:
    """The method of a compressed checkpoint and what it was asked for; None of any other model."""
    found = report_of(model)
    if found is None:
        return None
    return {"method": found["method"], **{key: found["settings"].get(key) for key in RATIO}}
