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
from experiments.records.identity import flat
from experiments.report.defaults import differences
from experiments.tables.layouts.cells import Column, cell
from experiments.tables.names.methods import display_name, method_order

OWN = ("finished", "overrides")  # of an environment, what each run has of its own
COLOURS = 128  # of an image's palette: a third of the bytes, and nothing that shows


@dataclass(frozen=True)
class File:
    """A link to a file, relative to the page."""

    name: str
    link: str
    kilobytes: float


@dataclass(frozen=True)
class Figure:
    """An image as a data URI, what it shows in words, and its files relative to the page.

    A drawing (SVG) has the colours of the page, an image (PNG) those of paper.
    """

    caption: str
    words: str
    uri: str
    is_drawing: bool
    files: list[File]


@dataclass(frozen=True)
class Run:
    """One run: its row of the table, what isn't as by default, and what its folder holds."""

    row: dict[str, Any]
    settings: dict[str, Any]
    differs: dict[str, str]
    metrics: dict[str, Any]
    figures: list[Figure]
    files: list[File]

    @property
    def name(self) -> str:
        return self.row["folder"]

    @property
    def method(self) -> str:
        """Its name in tables."""
        return display_name(self.row["method"])

    @property
    def ratio(self) -> str:
        """What was asked to be removed, or to be left."""
        return "" if self.row["method"] == "dense" else cell(Column("ratio"), self.row).text

    @property
    def state(self) -> str:
        """done, failed, damaged, interrupted or unfinished."""
        if self.row["status"] != "done" and RunFiles(self.row["_path"]).was_interrupted:
            return "interrupted"
        return self.row["status"].partition(":")[0]

    @property
    def is_bad(self) -> bool:
        """Whether the same command, given again, wouldn't finish it."""
        return self.state in ("failed", "damaged")

    @property
    def reason(self) -> str:
        if self.state == "interrupted":
            return "The same command goes on where it was."
        return self.row["status"].partition(": ")[2]

    @property
    def finished(self) -> str:
        """When it ended, to the minute."""
        return str(self.environment.get("finished", ""))[:16].replace("T", " ")

    @property
    def environment(self) -> dict[str, Any]:
        return self.metrics.get("environment", {})

    @property
    def versions(self) -> dict[str, Any]:
        return self.metrics.get("versions", {})

    @property
    def seconds(self) -> dict[str, float]:
        return self.metrics.get("seconds", {})


def read_run(row: dict[str, Any], page: Path) -> Run:
    """The run of a row of `read_runs`, its files linked from the page that will be at `page`."""
    found = RunFiles(row["_path"])
    settings = read_json(found.settings).get("settings", {}) if is_json(found.settings) else {}
    missing = {key for key, value in row.items() if not isinstance(value, dict) and _is_nan(value)}
    return Run(
        row={key: None if key in missing else value for key, value in row.items()},
        settings={key: _readable(value) for key, value in flat(settings).items()},
        differs=differences(settings, row["method"]) if "method" in settings else {},
        metrics=read_json(found.metrics) if is_json(found.metrics) else {},
        figures=[embedded(file, page) for file in found.figures()],
        files=_files(found.folder, page),
    )


def in_order(runs: Iterable[Run]) -> list[Run]:
    """By model, method as in tables, ratio, settings and seed."""

    def place(run: Run) -> tuple:
        sparsity, bits = (run.row.get(key) or 0 for key in ("sparsity", "bits"))
        settings = sorted(run.differs.items())
        seed = str(run.row["seed"])
        return run.row["model"], method_order(run.row["method"]), sparsity, -bits, settings, seed

    return sorted(runs, key=place)


def embedded(file: Path, page: Path) -> Figure:
    """A figure by its PNG as part of the page that will be at `page`: the SVG where there is one.

    As images both are inert, whatever their files contain.
    """
    drawing = file.with_suffix(".svg")
    with Image.open(file) as image:
        told = str(image.info.get("Title", "")) or file.stem.replace("_", " ")
        if drawing.exists():
            kind, data = "svg+xml", drawing.read_bytes()
        else:
            packed = io.BytesIO()
            palette = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
            palette.save(packed, "PNG", optimize=True)
            kind, data = "png", packed.getvalue()
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    caption, _, words = told.partition(": ")
    kinds = (f for f in (file, file.with_suffix(".pdf"), drawing) if f.exists())
    return Figure(caption, words, uri, drawing.exists(), [_file(f, page) for f in kinds])


def environments(runs: Iterable[Run]) -> list[tuple[dict[str, Any], int]]:
    """The different environments that runs tell of, each with their number, most first."""
    known: list[dict[str, Any]] = []
    for run in runs:
        place = {key: value for key, value in run.environment.items() if key not in OWN}
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
