"""The paper's tables: for each study and model its scores, and what they cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from camera.calibration.corpora import HUB
from experiments.tables.aggregate import over_seeds
from experiments.tables.best import paired_error, places
from experiments.tables.comparable import ComparableRuns, comparable_runs
from experiments.tables.layouts.captions import damage_caption, notes_of, scores_caption, sources
from experiments.tables.layouts.cells import Cell, Column, cell
from experiments.tables.names.divergence import measure_and_text
from experiments.tables.names.methods import display_name
from experiments.tables.published.comparison import compare
from experiments.tables.rows import (
    BITS,
    COSTS,
    REALISED,
    divergence_columns,
    less_is_better,
    score_columns,
    written_columns,
)

Errors = Literal["none", "std", "se"]
ASIDE = {"sparsity": 0.5, "bits": 0.01}  # what was realised is told if it is further from the asked


@dataclass(frozen=True)
class Row:
    """One line: a cell for each column, and the run folders that it comes from."""

    cells: list[Cell]
    folders: list[str] = field(default_factory=list)  # none: these scores were published


@dataclass(frozen=True)
class Table:
    """Rows in groups with a rule between them; a row's first cell is the ratio of its group.

    `study` is what the runs ask (`names.studies`), `caption` says what is measured on what, `notes`
    what the marks of its cells mean; `label` is the name to refer to it by, its own on a page.
    """

    title: str
    columns: list[Column]
    groups: list[list[Row]]
    study: str = ""
    caption: str = ""
    notes: list[str] = field(default_factory=list)
    label: str = ""

    def shown(self) -> Iterator[list[list[Cell]]]:
        """The cells by group and row, the ratio only where a group begins."""
        for first, *others in self.groups:
            yield [first.cells, *([Cell(""), *row.cells[1:]] for row in others)]


@dataclass(frozen=True)
class Page:
    """Tables, and what has to be said below them."""

    tables: list[Table]
    notes: list[str]


def paper_page(runs: pd.DataFrame, *, errors: Errors = "std", delta: str = "") -> Page:
    """The page of `read_runs` rows: a table for each study, seeds as one row.

    The best methods of each ratio and the second are marked, with those that can't be told from
    them (`best.places`). Behind a score stands its standard deviation over the seeds, where
    there are several (`std`), or its standard error (`se`), or nothing (`none`). `delta` names
    a method: the average's difference to that one's at the same ratio (`dense`: to the dense
    model's) is added, with `se` with the error of that difference, on the same questions.
    Published scores follow the run of the same setting. A run that isn't finished is in the notes,
    with the reason.
    """
    means = over_seeds(runs)
    if means.empty:
        return Page([], [])
    done = means["status"] == "done"
    expected = compare(means)
    tables: list[Table] = []
    for block in comparable_runs(means[done]):
        tables += _tables(block, expected, errors, delta)
    told = dict.fromkeys(note for table in tables for note in table.notes)
    unfinished = [_unfinished(run) for run in means[~done].to_dict("records")]
    return Page(_labelled(tables), [*told, *sources(expected), *unfinished])


def _tables(
    block: ComparableRuns, expected: pd.DataFrame, errors: Errors, delta: str
) -> Iterator[Table]:
    runs, dense = block.runs, block.dense
    named = ["ratio", "method", *(["settings"] if runs["settings"].any() else [])]
    damage = _known(runs, divergence_columns(runs))
    written = _known(runs, written_columns(runs))
    apart = {*damage, *written}
    scores = [score for score in _known(runs, score_columns(runs)) if score not in apart]
    if scores:
        first = ["n"] if (runs["n"] > 1).any() else []
        first += [score for score in scores if score == "average"]
        if delta and "average" in scores:
            block = replace(block, runs=_compared(block, delta))
            first += _known(block.runs, ["delta"])
        first += _realised(block)
        columns = [*named, *first, *(score for score in scores if score != "average")]
        table = _table(block, columns, expected, errors)
        caption = scores_caption(block, table.columns)
        yield replace(table, caption=caption, notes=notes_of(table, errors, block.data))
    if damage:
        table = _table(block, [*named, *damage], expected[:0], errors)
        texts = list(dict.fromkeys(measure_and_text(column)[1] for column in damage))
        table = replace(table, title=f"{block.title}: damage", caption=damage_caption(block, texts))
        yield replace(table, notes=notes_of(table, errors, block.data))
    if written:
        table = _table(block, [*named, *written], expected[:0], errors)
        caption = "Tasks whose answers the model writes (↑, %), by the first metric of each."
        table = replace(table, title=f"{block.title}: written answers", caption=caption)
        yield replace(table, notes=notes_of(table, errors, block.data))
    compressed = runs["method"] != "dense"
    if scores and compressed.any():
        block = replace(block, runs=runs[compressed])
    removed = [] if block.of is None else [f"sparsity_{of}" for of in REALISED]
    costs = _known(block.runs, [*removed, *BITS[1:], *COSTS])
    table = _table(block, [*named, *costs], expected[:0], "none")
    size = "" if dense is None else f"Dense: {cell(Column('size_mb'), dense.to_dict()).text} MB."
    title = f"{block.title}: cost"
    yield replace(table, title=title, caption=size, notes=notes_of(table, "none", HUB))


def _compared(block: ComparableRuns, method: str) -> pd.DataFrame:
    """The runs with their average's difference to a method's at the same ratio, and its error.

    Of several rows of the method the one without settings counts.
    """
    differences: dict[Any, tuple[float, float | None]] = {}
    dense = [] if block.dense is None else [block.dense.to_dict()]
    for group in block.groups():
        usual = group[(group["method"] == method) & (group["settings"] == "")]
        for base in dense if method == "dense" else usual.head(1).to_dict("records"):
            for label, run in group.to_dict("index").items():
                error = paired_error(base, run, "average")
                differences[label] = run["average"] - base["average"], error
    found = pd.DataFrame.from_dict(
        differences, orient="index", columns=["delta", "delta_se"], dtype=float
    )
    return block.runs.join(found)


def _known(runs: pd.DataFrame, columns: list[str]) -> list[str]:
    return [column for column in columns if runs[column].notna().any()]


def _realised(block: ComparableRuns) -> list[str]:
    """The column of what was removed, or stored, where a run missed what was asked of it."""
    asked, of = (
        ("bits", "bits_stored") if block.of is None else ("sparsity", f"sparsity_{block.of}")
    )
    missed = (block.runs[of] - block.runs[asked]).abs() > ASIDE[asked]
    return [of] if missed.any() else []


def _table(
    block: ComparableRuns, names: list[str], expected: pd.DataFrame, errors: Errors
) -> Table:
    scores = {*score_columns(block.runs)} - {"delta"}
    ends = {name: "low" if less_is_better(name) else "high" for name in scores}
    columns = [Column(name, ends.get(name), block.data) for name in names]
    groups = [_group(group, columns, expected, errors) for group in block.groups()]
    return Table(block.title, columns, groups, block.study)


def _group(
    runs: pd.DataFrame, columns: list[Column], expected: pd.DataFrame, errors: Errors
) -> list[Row]:
    records = runs.to_dict("index")
    down = []
    for column in columns:
        marks = places([*records.values()], column.name, column.best)
        cells = [cell(column, run, errors) for run in records.values()]
        down.append([replace(c, place=mark) for c, mark in zip(cells, marks, strict=True)])
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


def _labelled(tables: Iterable[Table]) -> list[Table]:
    """Each with a label of its own: study, model, what the ratio is of, as far as that tells."""
    seen: Counter[str] = Counter()
    found = []
    for table in tables:
        words = re.sub(r"\(.*?\)", "", table.title.partition(": ")[2].removeprefix("Ablation: "))
        label = re.sub(r"[^a-z0-9]+", "-", f"{table.study} {words}".lower()).strip("-")
        seen[label] += 1
        number = f"-{seen[label]}" if seen[label] > 1 else ""
        found.append(replace(table, label=f"tab:{label}{number}"))
    return found


def _unfinished(run: dict[str, Any]) -> str:
    """What the page says of a run that has no result."""
    seed = "" if run["seed"] is None else f"seed={run['seed']}"
    told = [display_name(run["method"]), cell(Column("ratio"), run).text, run["settings"], seed]
    return f"{run['model']}, {', '.join(part for part in told if part)}: {run['status']}"
