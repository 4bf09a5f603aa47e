"""From runs to the page: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from experiments.records.files import OutputFolder, write_text
from experiments.report.facts import facts, own_differences, shared_differences
from experiments.report.runs import Figure, Run, embedded, environments, in_order, read_run
from experiments.tables.aggregate import over_seeds
from experiments.tables.best import best_at_each_ratio
from experiments.tables.layouts.html import to_html
from experiments.tables.names.datasets import dataset_label
from experiments.tables.pages import Page, paper_page
from experiments.tables.rows import perplexity_columns


def write_report(
    runs: pd.DataFrame, folder: Path, page: Path, figures: Sequence[Path] | None = None
) -> Path:
    """Write the page of these rows of `read_runs`, with the `figures` over them.

    Figures that aren't given are drawn, to folder/figures.
    """
    if figures is None:
        from experiments.figures.comparison import draw_comparisons

        figures = draw_comparisons(runs, OutputFolder(folder).figures)
    shown = [embedded(file, page) for file in figures]
    told = in_order([read_run(row, page) for row in runs.to_dict("records")])
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, to_page(runs, told, shown, folder.resolve()))
    return page


def to_page(runs: pd.DataFrame, told: Sequence[Run], figures: list[Figure], folder: Path) -> str:
    """The page as HTML; whatever comes from files is escaped."""
    environment = Environment(
        loader=PackageLoader("experiments.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = paper_page(runs[runs["status"] == "done"])
    shared = shared_differences(told)
    return environment.get_template("page.html").render(
        name=folder.name,
        facts=facts(told, folder),
        runs=told,
        differs={run.name: own_differences(run, shared) for run in told},
        perplexities=_perplexities(runs),
        headlines=list(best_at_each_ratio(over_seeds(runs))),
        tables=[(table, to_html(Page([table], []))) for table in page.tables],
        notes=page.notes,
        figures=figures,
        environments=environments(told),
    )


def _perplexities(runs: pd.DataFrame) -> dict[str, str]:
    """The perplexities that were measured, and how they are called: by all names of their data."""
    done = runs[runs["status"] == "done"]
    found = {}
    for name in perplexity_columns(done):
        known = done[done[name].notna()]
        labels = [dataset_label(name, data, short=True) for data in known["data"]]
        found[name] = ", ".join(dict.fromkeys(labels))
    return found
