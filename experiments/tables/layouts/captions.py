"""What is said around tables: what was measured, what marks mean, where numbers come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from camera.calibration.corpora import CORPORA
from experiments.tables.comparable import ComparableRuns
from experiments.tables.layouts.cells import SPEED, Column
from experiments.tables.names.datasets import data_note, dataset_label

if TYPE_CHECKING:
    from experiments.tables.pages import Errors, Table

MARKS = (
    "Best of a ratio in bold, second underlined, each with all methods within one standard error "
    "of it; Dense and floors (Random, Magnitude, RTN) aren't ranked."
)


def scores_caption(block: ComparableRuns, columns: list[Column]) -> str:
    """What the scores are of, and on what the methods were calibrated."""
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
    sentences = [_upper("; ".join(told)), _calibration(block)]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def damage_caption(block: ComparableRuns, texts: list[str]) -> str:
    """What the comparison with the dense model is of, and how much of its distribution is seen."""
    named = " and ".join(dataset_label(text, block.data) for text in texts)
    tops = {(i.get("evaluation") or {}).get("divergence") for i in block.runs["_identity"]} - {None}
    seen = ""
    if len(tops) == 1:
        seen = f" Of the dense model its {tops.pop()} likeliest tokens and the rest."
    return (
        f"Against the dense model on {named}: KL divergence (↓, nats per token), share of tokens "
        f"with the same likeliest one and expected speculative acceptance Σ min(p, q) (↑, %).{seen}"
    )


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


def notes_of(table: Table, errors: Errors, data: str) -> list[str]:
    """What the marks in a table's cells mean, and what its texts and tasks are."""
    cells = [c for group in table.groups for row in group for c in row.cells]
    lines = []
    if any(c.place for c in cells):
        lines.append(MARKS)
    if any(c.error for c in cells):
        kind = "standard deviation over the seeds" if errors == "std" else "standard error"
        lines.append(f"± {kind}.")
    if any(c.remark for c in cells):
        lines.append("cached: with the cost of statistics that another run had gathered.")
    if any(c.differs for c in cells):
        lines.append("≠: further from what was published than the combined standard error.")
    return [*lines, *filter(None, [data_note(data)])]


def sources(expected: pd.DataFrame) -> list[str]:
    """Where published scores come from, and which of them can't be judged."""
    lines = []
    if expected["differs"].isna().any():
        lines.append("A perplexity of one seed has no known error, so no ≠ either.")
    named = expected[["name", "source"]].drop_duplicates()
    return [*lines, *(f"{name}: {source}." for name, source in named.itertuples(index=False))]
