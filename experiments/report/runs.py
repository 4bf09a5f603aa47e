"""What the report says of each run: settings, cost, environment, figures and files."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from PIL import Image

from experiments.records.files import RunFiles, is_json, read_json

COLOURS = 128  # of an image's palette: a third of the bytes, and nothing that shows


@dataclass(frozen=True)
class File:
    """A link to a file, relative to the page."""

    name: str
    link: str
    kilobytes: float


@dataclass(frozen=True)
class Figure:
    """An image as a data URI, what it is called, and its files relative to the page."""

    name: str
    uri: str
    files: list[File]


@dataclass(frozen=True)
class Run:
    """One run: its row of the table, and what its folder holds."""

    row: dict[str, Any]
    settings: dict[str, Any]
    seconds: dict[str, float]
    environment: dict[str, Any]
    versions: dict[str, Any]
    figures: list[Figure]
    files: list[File]

    @property
    def name(self) -> str:
        return self.row["folder"]

    @property
    def state(self) -> str:
        """done, failed, damaged or unfinished."""
        return self.row["status"].partition(":")[0]

    @property
    def reason(self) -> str:
        return self.row["status"].partition(": ")[2]


def read_run(row: dict[str, Any], page: Path) -> Run:
    """The run of a row of `read_runs`, its files linked from the page that will be at `page`."""
    found = RunFiles(row["_path"])
    metrics = read_json(found.metrics) if is_json(found.metrics) else {}
    settings = read_json(found.settings).get("settings", {}) if is_json(found.settings) else {}
    flat = pd.json_normalize(settings).iloc[0].to_dict() if settings else {}
    missing = {key for key, value in row.items() if not isinstance(value, dict) and _is_nan(value)}
    return Run(
        row={key: None if key in missing else value for key, value in row.items()},
        settings={key: _readable(value) for key, value in flat.items()},
        seconds=metrics.get("seconds", {}),
        environment=metrics.get("environment", {}),
        versions=metrics.get("versions", {}),
        figures=[embedded(file, page) for file in found.figures()],
        files=_files(found.folder, page),
    )


def embedded(file: Path, page: Path) -> Figure:
    """A PNG as part of the page that will be at `page`."""
    packed = io.BytesIO()
    with Image.open(file) as image:
        palette = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    palette.save(packed, "PNG", optimize=True)
    data = base64.b64encode(packed.getvalue()).decode()
    files = [_file(f, page) for f in (file, file.with_suffix(".pdf")) if f.exists()]
    return Figure(file.stem, f"data:image/png;base64,{data}", files)


def environments(runs: Iterable[Run]) -> list[tuple[dict[str, Any], int]]:
    """The different environments that runs tell of, each with their number, most first."""
    known: list[dict[str, Any]] = []
    for run in runs:
        place = {key: value for key, value in run.environment.items() if key != "finished"}
        known += filter(None, [place | run.versions])
    counted = Counter(map(repr, known))
    by_name = {repr(environment): environment for environment in known}
    return [(by_name[name], count) for name, count in counted.most_common()]


def _files(folder: Path, page: Path) -> list[File]:
    files = (f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith("."))
    return [_file(file, page) for file in files]


def _file(file: Path, page: Path) -> File:
    link = quote(os.path.relpath(file, page.parent))
    return File(file.name, link, file.stat().st_size / 1000)


def _readable(value: Any) -> Any:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and pd.isna(value)
