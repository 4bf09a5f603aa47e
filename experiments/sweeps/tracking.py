"""A finished sweep as a tracker is told of it: its tables, perplexity over sparsity, its report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.records.failures import one_line
from experiments.records.files import OutputFolder, SweepFiles
from experiments.runs.summary import group_of

if TYPE_CHECKING:
    import pandas as pd

    from experiments.runs.tracking import Tracker
    from experiments.tables.pages import Page, Table

log = logging.getLogger("camera")
AXES = {"sparsity": "sparsity in percent", "bits": "bits"}  # columns of `read_runs`


def track_sweep(
    tracker: Tracker,
    sweep: SweepFiles,
    preset: str | None,
    runs: pd.DataFrame,
    figures: Sequence[Path] | None = None,
) -> None:
    """One run of type `sweep`, with what `runs`, the rows of its runs, come to.

    figures: those over its runs, where they are drawn already. A tracker that keeps nothing is told
    nothing: the report is made for it alone.
    """
    if not tracker.keeps or runs.empty or not (runs["status"] == "done").any():
        return
    from experiments.tables.pages import paper_page

    done, group, page = runs[runs["status"] == "done"], group_of(sweep.name, preset), None
    page = paper_page(done)
    tables = dict(_tables(page))
    tracker.start(
        sweep.folder,
        name=group,
        group=group,
        job_type="sweep",
        tags=[*sorted(set(done["model"])), *([preset] if preset else [])],
        config={
            "sweep": sweep.name,
            "preset": preset,
            "runs": list(done["folder"]),
            "tables": {key: table.title for key, table in tables.items()},
        },
    )
    tracker.log_tables({key: table_frame(table) for key, table in tables.items()})
    for about in curves(done):
        tracker.log_curves(**about)
    _log_report(tracker, sweep, done, figures)
    tracker.finish()


def table_frame(table: Table) -> pd.DataFrame:
    """A table of the paper's page: texts as they are shown, numbers unrounded."""
    import pandas as pd

    rows = [
        [
            cell.text if column.is_text else cell.value
            for column, cell in zip(table.columns, row.cells, strict=True)
        ]
        for group in table.groups
        for row in group
    ]
    return pd.DataFrame(rows, columns=[column.header for column in table.columns])


def curves(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Each perplexity and KL divergence over sparsity and over bits: a line per method, from the
    dense model on."""
    import pandas as pd

    from experiments.tables.names.datasets import dataset_label
    from experiments.tables.names.methods import display_name
    from experiments.tables.rows import divergence_columns, less_is_better, perplexity_columns

    dense = runs[runs["method"] == "dense"]
    methods = runs["method"].map(display_name) + " " + runs["settings"]
    several = runs["model"].nunique() > 1
    lines = (runs["model"] + " " + methods if several else methods).str.strip()
    compared = [score for score in divergence_columns(runs) if less_is_better(score)]
    for score in [*perplexity_columns(runs), *compared]:
        text = " and ".join(dict.fromkeys(dataset_label(score, data) for data in runs["data"]))
        what = text if score in compared else f"Perplexity of {text}"
        for x, axis in AXES.items():
            shown = runs[x].notna() & runs[score].notna()
            parts = [
                pd.DataFrame({"method": line, x: own[x], score: own[score]}).sort_values(x)
                for line, own in runs[shown].groupby(lines[shown], sort=True)
            ]
            if x == "sparsity":
                parts = [_from_dense(part, dense, runs, score) for part in parts]
            if parts:
                yield {
                    "curves": pd.concat(parts, ignore_index=True),
                    "x": x,
                    "y": score,
                    "line": "method",
                    "title": f"{what} over {axis}",
                }


def _from_dense(
    part: pd.DataFrame, dense: pd.DataFrame, runs: pd.DataFrame, score: str
) -> pd.DataFrame:
    import pandas as pd

    models = set(runs.loc[part.index, "model"])
    known = dense[dense["model"].isin(models)][score].dropna()
    if known.empty:
        return part
    first = {"method": part["method"].iloc[0], "sparsity": 0.0, score: known.iloc[0]}
    return pd.concat([pd.DataFrame([first]), part], ignore_index=True)


def _tables(page: Page) -> Iterator[tuple[str, Table]]:
    for number, table in enumerate(page.tables, start=1):
        yield "paper" if number == 1 else f"paper_{number}", table


def _log_report(
    tracker: Tracker, sweep: SweepFiles, runs: pd.DataFrame, figures: Sequence[Path] | None
) -> None:
    """The HTML report of its runs, and the figures that are drawn for it."""
    from experiments.report.writing import write_report

    folder = OutputFolder(sweep.folder)
    try:
        page = write_report(runs, sweep.folder, folder.report, figures)
    except Exception as error:  # a font, a backend: tables and curves are there
        log.warning("%s: no report: %s", sweep.name, one_line(error))
        return
    tracker.log_page(page)
    tracker.log_figures(sorted(folder.figures.glob("*.png")))


def preset_of_sweep(sweep: SweepFiles) -> str | None:
    """The preset that a sweep was started with, from Hydra's configuration in its folder."""
    from omegaconf import OmegaConf

    if not sweep.config.exists():
        return None
    return OmegaConf.select(OmegaConf.load(sweep.config), "hydra.runtime.choices.experiment")
