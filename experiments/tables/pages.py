"""The paper's tables: for each block of comparable runs its scores, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from experiments.tables.aggregate import over_seeds
from experiments.tables.cells import Cell, Column, cell, ranked
from experiments.tables.comparable import ComparableRuns, comparable_runs
from experiments.tables.published.comparison import compare
from experiments.tables.rows import BITS, COSTS, REALISED, perplexity_columns, score_columns

Errors = Literal["none", "std", "se"]


@dataclass(frozen=True)
class Row:
    """One line: a cell for each column, and the run folders that it comes from."""

    cells: list[Cell]
    folders: list[str] = field(default_factory=list)  # none: these scores were published


@dataclass(frozen=True)
class Table:
    """Rows in groups with a rule between them; a row's first cell is the ratio of its group."""

    title: str
    columns: list[Column]
    groups: list[list[Row]]


@dataclass(frozen=True)
class Page:
    """Tables, and what has to be said below them."""

    tables: list[Table]
    notes: list[str]


def paper_page(runs: pd.DataFrame, *, errors: Errors = "std", delta: bool = False) -> Page:
    """The page of `read_runs` rows: seeds as one row, the best two of each group marked.

    Behind a score stands its standard deviation over the seeds, where there are several (`std`),
    or the standard error of a task (`se`), or nothing (`none`). `delta` adds by how much the
    average is above the dense model's. Published scores follow the run of the same setting. A run
    that isn't finished is in the notes, with the reason.
    """
    means = over_seeds(runs)
    if means.empty:
        return Page([], [])
    done = means["status"] == "done"
    expected = compare(means)
    tables = []
    for block in comparable_runs(means[done]):
        tables += _tables(block, expected, errors, delta)
    notes = [_unfinished(run) for run in means[~done].to_dict("records")]
    return Page(tables, [*_legend(tables, errors, expected), *notes])


def _tables(
    block: ComparableRuns, expected: pd.DataFrame, errors: Errors, delta: bool
) -> Iterator[Table]:
    runs, dense = block.runs, block.dense
    named = ["ratio", "method", *(["settings"] if runs["settings"].any() else [])]
    if scores := _known(runs, score_columns(runs)):
        less = perplexity_columns(runs)
        if delta and dense is not None and "average" in scores:
            block = replace(block, runs=runs.assign(delta=runs["average"] - dense["average"]))
            scores.insert(scores.index("average") + 1, "delta")
        seeds = ["n"] if (runs["n"] > 1).any() else []
        realised = "bits_stored" if block.of is None else f"sparsity_{block.of}"
        columns = [Column(name) for name in (*named, *seeds, *_known(runs, [realised]))]
        best = {score: "low" if score in less else "high" for score in scores if score != "delta"}
        columns += [Column(score, best.get(score)) for score in scores]
        yield _table(block.title, columns, block, expected, errors)
    removed = [] if block.of is None else [f"sparsity_{of}" for of in REALISED]
    costs = _known(runs, [*removed, *BITS[1:], *COSTS])
    columns = [Column(name) for name in (*named, *costs)]
    yield _table(f"{block.title}: cost", columns, block, expected[:0], "none")


def _known(runs: pd.DataFrame, columns: list[str]) -> list[str]:
    return [column for column in columns if runs[column].notna().any()]


def _table(
    title: str, columns: list[Column], block: ComparableRuns, expected: pd.DataFrame, errors: Errors
) -> Table:
    groups = [_group(group, columns, expected, errors) for group in block.groups()]
    return Table(title, columns, groups)


def _group(
    runs: pd.DataFrame, columns: list[Column], expected: pd.DataFrame, errors: Errors
) -> list[Row]:
    records = runs.to_dict("index")
    down = [
        ranked([cell(column, run, errors) for run in records.values()], column.best)
        for column in columns
    ]
    rows = []
    for cells, (label, run) in zip(zip(*down, strict=True), records.items(), strict=True):
        found = expected[expected["row"] == label]
        differing = set(found.loc[found["differs"].eq(True), "score"])
        marked = [
            replace(c, differs=column.name in differing)
            for c, column in zip(cells, columns, strict=True)
        ]
        rows.append(Row(marked, run["folders"]))
        for name, scores in found.groupby("name", sort=False):
            known = dict(zip(scores["score"], scores["published"], strict=True))
            published = known | {key: run[key] for key in ("sparsity", "bits")}
            published["method"] = f"{name} (published)"
            rows.append(Row([cell(column, published) for column in columns]))
    return rows


def _unfinished(run: dict[str, Any]) -> str:
    """What the page says of a run that has no result."""
    seed = "" if run["seed"] is None else f"seed={run['seed']}"
    told = [run["method"], cell(Column("ratio"), run).text, run["settings"], seed]
    return f"{run['model']}, {', '.join(part for part in told if part)}: {run['status']}"


def _legend(tables: list[Table], errors: Errors, expected: pd.DataFrame) -> list[str]:
    cells = [c for table in tables for group in table.groups for row in group for c in row.cells]
    lines = []
    if any(c.place for c in cells):
        lines.append("Best of a ratio in bold, second underlined.")
    if any(c.error for c in cells):
        kind = "standard deviation over the seeds" if errors == "std" else "standard error"
        lines.append(f"± {kind}.")
    if any(c.differs for c in cells):
        lines.append("≠: further from what was published than the combined standard error.")
    if expected["differs"].isna().any():
        lines.append("A perplexity of one seed has no known error, so no ≠ either.")
    sources = expected[["name", "source"]].drop_duplicates()
    return [*lines, *(f"{name}: {source}." for name, source in sources.itertuples(index=False))]
