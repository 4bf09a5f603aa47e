"""Tables and figures of the pages, from the runs of an output folder.

    make run ARGS="experiment=all" && python docs/measured.py outputs README.md

A table between <!-- measured: STUDY METHODS COLUMN ... --> and <!-- /measured --> is made anew in
each page that is named: of these methods (`all`, or names between commas) with their usual
settings, the columns of `experiments.tables.rows.read_runs`. So are the figures in docs/figures, as
far as the folder has runs that they show.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from experiments.figures.comparison import draw_comparisons
from experiments.figures.run import draw_run
from experiments.tables.aggregate import over_seeds
from experiments.tables.comparable import comparable_runs
from experiments.tables.layouts.cells import Cell, Column, cell
from experiments.tables.layouts.markdown import to_markdown
from experiments.tables.pages import Page, Row, Table
from experiments.tables.rows import less_is_better, runs_below, score_columns

FIGURES = Path(__file__).parent / "figures"
BLOCK = re.compile(r"(<!-- measured: (\S+) (\S+) (.+?) -->\n).*?(<!-- /measured -->)", re.DOTALL)
OVER_RUNS = {  # the name of a figure on the pages: the study and the name that it is drawn under
    "c4-sparsity": "main-c4-sparsity",
    "average-sparsity": "main-average-sparsity",
    "average-size": "main-average-size",
    "average-bits": "quantization-average-bits",
    "c4-alpha": "alpha-c4-alpha",
    "c4-samples": "calibration_size-c4-samples",
}
OF_A_RUN = ("energies", "energy_shares", "expert_energies", "widths")  # of Camera-P at 40 %


def filled(page: str, runs: pd.DataFrame) -> str:
    """The page with its tables of these runs; SystemExit where a study isn't among them."""

    def made(block: re.Match) -> str:
        head, study, methods, columns, end = block.groups()
        return head + table(runs, study, methods, columns) + end

    return BLOCK.sub(made, page)


def table(runs: pd.DataFrame, study: str, methods: str, columns: str) -> str:
    """A study's rows in Markdown, and what an average's standard error is."""
    shown = runs["method"].isin(methods.split(",")) & (runs["settings"] == "")
    runs = runs if methods == "all" else runs[shown]
    blocks = comparable_runs(over_seeds(runs[runs["status"] == "done"]))
    block = next((block for block in blocks if block.study == study), None)
    if block is None:
        raise SystemExit(f"The runs have no study {study}.")
    scores = score_columns(block.runs)

    def column(name: str) -> Column:
        best = "low" if less_is_better(name) else "high"
        return Column(name, best if name in scores else None, block.data)

    heads = [column(name) for name in columns.split()]
    groups = [[Row(_cells(heads, run)) for run in _records(group)] for group in block.groups()]
    text = to_markdown(Page([Table("", heads, groups)], [])).partition("\n\n")[2]
    error = block.runs["average_se"].dropna()
    return text + (f"\nStandard error of the average: {error.max():.1f}.\n" if len(error) else "")


def _cells(heads: list[Column], run: dict) -> list[Cell]:
    return [cell(head, run, "std") for head in heads]


def _records(group: pd.DataFrame) -> list[dict]:
    return group.to_dict("records")


def figures(runs: pd.DataFrame, folder: Path) -> Iterator[Path]:
    """The PNGs of the pages that these runs show, drawn into the folder under the pages' names."""
    with TemporaryDirectory() as drawn:
        found = {file.stem: file for file in draw_comparisons(runs, Path(drawn))}
        for model in dict.fromkeys(runs["model"]):
            for name, made in OVER_RUNS.items():
                if file := found.get(f"{model}-{made}"):
                    yield Path(shutil.copy(file, folder / f"{model}-{name}.png"))
    usual = (runs["method"] == "camera_p") & (runs["sparsity"] == 40) & (runs["settings"] == "")
    for run in runs[usual & (runs["status"] == "done")].to_dict("records")[:1]:
        for file in draw_run(run["_path"]):
            if file.stem in OF_A_RUN:
                yield Path(shutil.copy(file, folder / f"{run['model']}-{file.stem}.png"))


if __name__ == "__main__":
    known = runs_below(Path(sys.argv[1]))
    for page in map(Path, sys.argv[2:]):
        page.write_text(filled(page.read_text(encoding="utf-8"), known), encoding="utf-8")
    for file in figures(known, FIGURES):
        print(file)
