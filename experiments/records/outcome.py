"""What a finished run leaves, in words: where the model is, how large, the line that loads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from experiments.records.files import COMPRESSION, OutputFolder, RunFiles

LABEL = 8  # letters of the words before the paths


def outcome(run: Path) -> list[str]:
    """The lines that a run ends with."""
    checkpoint = checkpoint_of(run)
    lines = []
    if checkpoint is not None:
        lines.append(_line("Model", f"{_near(checkpoint)}  ({sizes(run)})"))
    lines.append(_line("Run", _near(run)))
    return [*lines, *_next(checkpoint, OutputFolder(run.parent.parent))]


def outcome_of_sweep(runs: Sequence[Path], output: OutputFolder) -> list[str]:
    """The lines that a sweep ends with: every checkpoint of its runs, and how to load one."""
    made = {checkpoint: run for run in runs if (checkpoint := checkpoint_of(run)) is not None}
    lines = [
        _line("Models" if number == 0 else "", f"{_near(checkpoint)}  ({sizes(run)})")
        for number, (checkpoint, run) in enumerate(made.items())
    ]
    lines.append(_line("Runs", _near(output.folder / "runs")))
    return [*lines, *_next(next(iter(made), None), output)]


def checkpoint_of(run: Path) -> Path | None:
    """The compressed model of a run; None where it made none, or it was deleted."""
    made = (RunFiles(run).read_part(COMPRESSION) or {}).get("checkpoint")
    if made is None:
        return None
    here = OutputFolder(run.parent.parent).checkpoint(Path(made).name)  # the output may have moved
    return here if here.exists() else None


def sizes(run: Path) -> str:
    """The size of a run's checkpoint against the original's."""
    size = (RunFiles(run).read_part(COMPRESSION) or {})["bytes"]
    dense, compressed = size["dense"], size["compressed"]
    change = compressed / dense - 1
    compared = f"{abs(change):.0%} {'larger' if change > 0 else 'smaller'}"
    return f"{size_of(compressed)}; the original {size_of(dense)}, {compared}"


def size_of(size: float) -> str:
    """Bytes for people, with the digits that matter."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((each for each in units if size >= each[0]), (1.0, "bytes"))
    value = size / unit
    return f"{value:.1f} {name}" if unit > 1 and value < 100 else f"{value:.0f} {name}"


def _next(checkpoint: Path | None, output: OutputFolder) -> list[str]:
    load = [_line("Load", f'camera.load("{_near(checkpoint)}")')] if checkpoint else []
    return [*load, _line("More", f"camera report {_near(output.folder)}")]


def _near(path: Path) -> str:
    """The path from where the user stands, if it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"
