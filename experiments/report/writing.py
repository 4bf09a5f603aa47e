"""From runs to the page: one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from experiments.records.files import OutputFolder
from experiments.report.headlines import headlines
from experiments.report.runs import Figure, Run, embedded, environments, read_run
from experiments.tables.aggregate import over_seeds
from experiments.tables.layouts.html import to_html
from experiments.tables.pages import Page, paper_page


def write_report(runs: pd.DataFrame, folder: Path, page: Path) -> Path:
    """Draw the figures over these rows of `read_runs` to folder/figures, and write the page."""
    from experiments.figures.comparison import draw_comparisons

    figures = [
        embedded(file, page) for file in draw_comparisons(runs, OutputFolder(folder).figures)
    ]
    told = [read_run(row, page) for row in runs.to_dict("records")]
    page.parent.mkdir(parents=True, exist_ok=True)
    part = page.with_name(f".{page.name}")
    part.write_text(to_page(runs, told, figures, folder.resolve().name), encoding="utf-8")
    part.replace(page)
    return page


def to_page(runs: pd.DataFrame, told: list[Run], figures: list[Figure], name: str) -> str:
    """The page as HTML; whatever comes from files is escaped."""
    environment = Environment(
        loader=PackageLoader("experiments.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = paper_page(runs[runs["status"] == "done"])
    return environment.get_template("page.html").render(
        name=name,
        runs=told,
        headlines=headlines(over_seeds(runs)),
        tables=[
            {"title": table.title, "html": to_html(Page([table], []))} for table in page.tables
        ],
        notes=page.notes,
        figures=figures,
        environments=environments(told),
    )
