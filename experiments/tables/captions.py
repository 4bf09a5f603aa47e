"""What is said around tables: captions of scores, and the legend of a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from camera.calibration.corpora import CORPORA
from experiments.tables.cells import SPEED, Column
from experiments.tables.comparable import ComparableRuns
from experiments.tables.names.datasets import data_note, dataset_label
from experiments.tables.names.methods import display_name, is_ranked

if TYPE_CHECKING:
    from experiments.tables.pages import Errors, Table

MARKS = (
    "Bold: best of a ratio, underlined: second, each with all methods within one standard error "
    "of it."
)


def scores_caption(block: ComparableRuns, columns: list[Column]) -> str:
    """What the scores are, on what was calibrated, who isn't ranked."""
    texts = [c.name for c in columns if c.name in CORPORA]
    speeds = [c.name for c in columns if SPEED.fullmatch(c.name) or c.name.endswith("_x")]
    tasks = [c.name for c in columns if c.best == "high" and c.name not in {*speeds, "average"}]
    told = []
    if texts:
        named = " and ".join(dataset_label(text, block.data) for text in texts)
        told.append(f"perplexity (↓) on {named}")
    if tasks:
        mean = ", Avg their mean" if len(tasks) > 1 else ""
        number = f"{len(tasks)} tasks" if len(tasks) > 1 else dataset_label(tasks[0], block.data)
        told.append(f"accuracy (↑, %) on {number}{mean}")
    if speeds:
        told.append("speed (↑) as a multiple of the original's")
    sentences = [_upper("; ".join(told)), _calibration(block), _unranked(block)]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _calibration(block: ComparableRuns) -> str:
    """The text and its size, where all runs that have any were calibrated alike."""
    used = block.runs[["calibration", "samples", "length"]].dropna().drop_duplicates()
    if len(used) != 1:
        return ""
    source, samples, length = used.iloc[0]
    text = dataset_label(str(source), block.data)
    return f"Calibrated on {samples:.0f} × {length:.0f} tokens of {text}"


def _unranked(block: ComparableRuns) -> str:
    methods = dict.fromkeys(block.runs["method"])
    named = [display_name(method) for method in methods if not is_ranked(method)]
    return f"Not ranked: {', '.join(named)}" if named and len(named) < len(methods) else ""


def legend(
    tables: list[Table], errors: Errors, expected: pd.DataFrame, data: Iterable[str]
) -> list[str]:
    """What the marks of these tables mean, and where names and published scores come from."""
    cells = [c for table in tables for group in table.groups for row in group for c in row.cells]
    lines = []
    if any(c.place for c in cells):
        lines.append(f"{MARKS} The original and floors aren't ranked.")
    if any(c.error for c in cells):
        kind = "standard deviation over the seeds" if errors == "std" else "standard error"
        lines.append(f"± {kind}.")
    if any(c.remark for c in cells):
        lines.append("cached: of statistics that another run gathered, whose cost is included.")
    if any(c.differs for c in cells):
        lines.append("≠: further from what was published than the combined standard error.")
    if expected["differs"].isna().any():
        lines.append("A perplexity of one seed has no known error, so no ≠ either.")
    lines += filter(None, map(data_note, data))
    sources = expected[["name", "source"]].drop_duplicates()
    return [*lines, *(f"{name}: {source}." for name, source in sources.itertuples(index=False))]
