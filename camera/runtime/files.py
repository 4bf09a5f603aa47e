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
        has, needs = _told_apart(free, needed)
        raise CameraError(
            f"{folder} has {has} free and the checkpoint may need {needs}: free space or set "
            "output to another disk."
        )


def _told_apart(less: int, more: int) -> tuple[str, str]:
    """Two different sizes, in the unit of the larger and with as many digits as show it."""
    sizes = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((size for size in sizes if more >= size[0]), (1.0, "bytes"))
    texts = ([f"{n / unit:.{digits}f} {name}" for n in (less, more)] for digits in range(1, 10))
    has, needs = next(pair for pair in texts if pair[0] != pair[1])
    return has, needs


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
