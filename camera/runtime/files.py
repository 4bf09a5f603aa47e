"""Durable and atomic files, free space, content keys."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from camera.runtime.errors import CameraError


def replace_durably(partial: Path, path: Path) -> None:
    """Rename a finished file into place once its bytes are on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def require_space(folder: Path, needed: int) -> None:
    """Refuse if the disk of `folder` has less than `needed` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CameraError(
            f"{folder} has {free / 1e9:.1f} GB free and the checkpoint may need {needed / 1e9:.1f} "
            "GB: free space or set output to another disk."
        )


def write_json(path: Path, content: dict) -> None:
    """Write JSON so that the file is whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def content_key(about: dict) -> str:
    """A short name for what a cached file was made from."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def partial_of(path: Path) -> Path:
    """Where a file or folder grows until it is complete."""
    return path.with_name(f".{path.name}.partial")


class CheckpointFiles:
    """Names of the files of a checkpoint beside its weights and configuration."""

    REPORT = "camera.json"
    EVALUATION = "evaluation.json"
    STATISTICS = "statistics.safetensors"
    PLAN = "plan.safetensors"
