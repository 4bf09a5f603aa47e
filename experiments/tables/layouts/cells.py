"""Columns and cells of tables: what they are called, and how numbers are shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from camera.calibration.corpora import HUB
from experiments.tables.names.datasets import dataset_label
from experiments.tables.names.methods import display_name

HEADERS = {
    "ratio": "Ratio",
    "method": "Method",
    "settings": "Settings",
    "n": "Seeds",
    "sparsity_moe": "Experts removed",
    "sparsity_model": "Model removed",
    "sparsity_routed": "Routed removed",
    "bits_raw": "Raw bits",
    "bits_stored": "Stored bits",
    "bits_model": "Bits of all",
    "average": "Avg",
    "delta": "Δ",
    "size_mb": "MB",
    "minutes": "Minutes",
    "evaluation_minutes": "Eval. min.",
    "peak_gb": "Peak GB",
    "prefill_x": "Prefill ×",
    "decode_x": "Decode ×",
}
TEXTS = ("ratio", "method", "settings")
SPEED = re.compile(r"(prefill|decode)_(\d+)_x")  # of the batches after the first
TWO_DIGITS = ("wikitext2", "c4", "peak_gb")
CACHED = ("minutes", "peak_gb")  # columns that count statistics which another run gathered
ARROWS = {"low": "↓", "high": "↑"}
NOTHING, DIFFERS = "–", "≠"


@dataclass(frozen=True)
class Column:
    """A column by the name it has in `read_runs`, and which end of it is the best, if any.

    `data` is where a text or a task comes from, which decides what it may be called.
    """

    name: str
    best: Literal["low", "high"] | None = None
    data: str = HUB

    @property
    def header(self) -> str:
        """What stands above it; ↓ or ↑ says which end is the best."""
        return self.label + ARROWS.get(self.best or "", "")

    @property
    def label(self) -> str:
        if of_batch := SPEED.fullmatch(self.name):
            return f"{of_batch[1].title()}@{of_batch[2]} ×"
        return HEADERS.get(self.name) or dataset_label(self.name, self.data, short=True)

    @property
    def is_text(self) -> bool:
        """Text goes to the left, a number to the right."""
        return self.name in TEXTS


@dataclass(frozen=True)
class Cell:
    """What a cell shows: `text`, ± `error` if there is one, a `remark`, and how it stands out.

    `value` is the unrounded number or the text, by which a page can sort; `place` is 1 for the best
    of a group and 2 for the second, and for those tied with them; `differs` says that it isn't
    what was published.
    """

    text: str
    value: float | str | None = None
    error: str = ""
    remark: str = ""
    place: int = 0
    differs: bool = False

    @property
    def behind(self) -> str:
        """What follows the text: its error, its remark, the sign of a difference."""
        parts = [f"± {self.error}" if self.error else "", self.remark, DIFFERS * self.differs]
        return "".join(f" {part}" for part in parts if part)


def cell(column: Column, run: dict[str, Any], errors: str = "none") -> Cell:
    """A run's cell of a column, with the error of that kind (`std`, `se`) if the run has it."""
    name = column.name
    if name == "ratio":
        return _ratio(run["sparsity"], run["bits"])
    value = run.get(name)
    if value is None or pd.isna(value):
        return Cell(NOTHING)
    if name == "method":
        return Cell(display_name(value), value)
    if column.is_text:
        return Cell(value, value)
    error = run.get(f"{name}_{errors}")
    known = error is not None and not pd.isna(error)
    remark = "cached" if name in CACHED and (run.get("cached") or 0) > 0 else ""
    behind = _number(name, error).lstrip("+") if known else ""
    return Cell(_number(name, value), float(value), behind, remark)


def _ratio(sparsity: float, bits: float) -> Cell:
    parts = [] if pd.isna(sparsity) else [f"{sparsity:.3g}%"]
    parts += [] if pd.isna(bits) else [f"{bits:g} bits"]
    by = bits if pd.isna(sparsity) else sparsity
    return Cell(", ".join(parts) or NOTHING, float(by) if parts else None)


def _number(name: str, value: float) -> str:
    if name.startswith("kl_"):
        return f"{abs(value) if abs(value) < 5e-5 else value:.4f}"
    if name == "n":
        return str(int(value))
    if name == "delta":
        return f"{round(value, 1) + 0:+.1f}".replace("-", "−")
    fine = name in TWO_DIGITS or name.startswith("bits_") or name.endswith("_x")
    fine = fine or (name.endswith("minutes") and value < 10)
    digits = 2 if fine else 1
    unit = "%" if name.startswith("sparsity_") else ""
    return f"{value:,.{digits}f}{unit}" if abs(value) < 1e6 else f"{value:.1e}"
