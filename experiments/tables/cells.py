"""Formatting and ranking of table cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from camera.evaluation.tasks.names import PAPER_TASKS

HEADERS = {
    "ratio": "Ratio",
    "method": "Method",
    "settings": "Settings",
    "n": "Seeds",
    "sparsity_moe": "MoE",
    "sparsity_model": "Whole",
    "sparsity_routed": "Routed",
    "bits_raw": "Raw",
    "bits_stored": "Stored",
    "bits_model": "Bits of all",
    "wikitext2": "Wiki2",
    "c4": "C4",
    **{task.name: task.short_name for task in PAPER_TASKS},
    "average": "Avg",
    "delta": "Δ",
    "size_mb": "MB",
    "minutes": "Minutes",
    "peak_gb": "Peak GB",
    "prefill_x": "Prefill ×",
    "decode_x": "Decode ×",
}
TEXTS = ("ratio", "method", "settings")
SPEED = re.compile(r"(prefill|decode)_(\d+)_x")  # of the batches after the first
TWO_DIGITS = ("wikitext2", "c4", "peak_gb")
NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column by the name it has in `read_runs`, and which end of it is the best, if any."""

    name: str
    best: Literal["low", "high"] | None = None

    @property
    def header(self) -> str:
        if of_batch := SPEED.fullmatch(self.name):
            return f"{of_batch[1].title()}@{of_batch[2]} ×"
        return HEADERS.get(self.name, self.name)

    @property
    def is_text(self) -> bool:
        """Text goes to the left, a number to the right."""
        return self.name in TEXTS


@dataclass(frozen=True)
class Cell:
    """What a cell shows: `text`, ± `error` if there is one, and how it stands out.

    `value` is the unrounded number or the text, by which a page can sort; `place` is 1 for the best
    of a group and 2 for the second; `differs` says that it isn't what was published.
    """

    text: str
    value: float | str | None = None
    error: str = ""
    place: int = 0
    differs: bool = False


def cell(column: Column, run: dict[str, Any], errors: str = "none") -> Cell:
    """A run's cell of a column, with the error of that kind (`std`, `se`) if the run has it."""
    name = column.name
    if name == "ratio":
        return _ratio(run["sparsity"], run["bits"])
    value = run.get(name)
    if value is None or pd.isna(value):
        return Cell(NOTHING)
    if column.is_text:
        return Cell(value, value)
    error = run.get(f"{name}_{errors}")
    known = error is not None and not pd.isna(error)
    return Cell(_number(name, value), float(value), _number(name, error) if known else "")


def ranked(cells: Sequence[Cell], best: Literal["low", "high"] | None) -> list[Cell]:
    """The cells with the best and the second marked, by what is shown: equal numbers share a place.

    A number that is alone has no place.
    """
    shown = {cell.text: cell.value for cell in cells if cell.value is not None}
    if best is None or sum(cell.value is not None for cell in cells) < 2:
        return list(cells)
    order = sorted(shown, key=shown.__getitem__, reverse=best == "high")
    places = {text: place for place, text in enumerate(order[:2], start=1)}
    return [replace(cell, place=places.get(cell.text, 0)) for cell in cells]


def _ratio(sparsity: float, bits: float) -> Cell:
    parts = [] if pd.isna(sparsity) else [f"{sparsity:.3g}%"]
    parts += [] if pd.isna(bits) else [f"{bits:g} bits"]
    by = bits if pd.isna(sparsity) else sparsity
    return Cell(", ".join(parts) or NOTHING, float(by) if parts else None)


def _number(name: str, value: float) -> str:
    if name == "n":
        return str(int(value))
    if name == "delta":
        return f"{round(value, 1) + 0:+.1f}".replace("-", "−")
    digits = 2 if name in TWO_DIGITS or name.startswith("bits_") or name.endswith("_x") else 1
    unit = "%" if name.startswith("sparsity_") else ""
    return f"{value:,.{digits}f}{unit}" if abs(value) < 1e6 else f"{value:.1e}"
