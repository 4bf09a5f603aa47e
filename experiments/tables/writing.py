"""The tables of runs, made from their folders at any time.

DIR is an output folder, or any folder that has run folders below it. The page is table.md and
table.tex: a table per study, a row per setting with the mean over its seeds. Every single run is a
row of table.csv; the means and standard deviations, where there are several seeds, are in
table_seeds.csv; published scores of the same settings, where there are any, beside the runs' in
table_published.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from camera.runtime.errors import CameraError
from experiments.config.location import add_output_folder
from experiments.records.files import write_text
from experiments.tables.aggregate import over_seeds
from experiments.tables.layouts.latex import to_latex
from experiments.tables.layouts.markdown import to_markdown
from experiments.tables.layouts.terminal import print_page
from experiments.tables.names.datasets import dataset_key
from experiments.tables.pages import Page, paper_page
from experiments.tables.published.comparison import compare
from experiments.tables.rows import runs_below, score_columns


def write(runs: pd.DataFrame, folder: Path, page: Page | None = None) -> None:
    """The tables of the runs into the folder, each replaced when it is complete.

    `page` is what table.md and table.tex show, by default `paper_page(runs)`. A file that has
    nothing to say is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = page or paper_page(runs)
    means = over_seeds(runs)
    expected = compare(means)
    contents = {
        "table.csv": _csv(runs),
        "table.md": to_markdown(page),
        "table.tex": to_latex(page),
        "table_seeds.csv": _csv(means) if (means["n"] > 1).any() else None,
        "table_published.csv": None if expected.empty else _csv(expected.drop(columns="row")),
    }
    for name, content in contents.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
            continue
        write_text(folder / name, content)


def show(runs: pd.DataFrame) -> None:
    """Print the tables to the terminal."""
    print_page(paper_page(runs))


def _csv(frame: pd.DataFrame) -> str:
    named = _by_data(frame) if "data" in frame else frame
    public = named[[column for column in named if not column.startswith("_")]]
    lists = {
        column: public[column].map(lambda values: " ".join(map(str, values)))
        for column in ("studies", "seeds", "folders")
        if column in public
    }
    return public.assign(**lists).to_csv(index=False)


def _by_data(frame: pd.DataFrame) -> pd.DataFrame:
    """Texts and tasks of each data in columns of their own, under the name that they may have."""
    measured = {s for s in score_columns(frame) if s != "average" and not s.endswith("_x")}
    columns: dict[str, pd.Series] = {}
    for column in frame:
        score = column.removesuffix("_se").removesuffix("_std")
        if score not in measured:
            columns[column] = frame[column]
            continue
        for data in frame["data"].dropna().unique():
            name = dataset_key(score, data) + column.removeprefix(score)
            own = frame[column].where(frame["data"] == data)
            columns[name] = columns[name].fillna(own) if name in columns else own
    calibrated = zip(frame["calibration"], frame["data"], strict=True)
    columns["calibration"] = pd.Series(
        [dataset_key(text, data) if isinstance(text, str) else text for text, data in calibrated],
        index=frame.index,
        dtype=object,
    )
    return pd.DataFrame(columns)


def main(arguments: list[str]) -> int:
    """Remake and print the tables of a folder."""
    parser = argparse.ArgumentParser(prog="camera tables", description=__doc__)
    add_output_folder(parser)
    parser.add_argument(
        "--errors",
        choices=["none", "std", "se"],
        default="std",
        help="behind a score: its standard deviation over the seeds (the default), "
        "the standard error of a task, or nothing",
    )
    parser.add_argument(
        "--delta",
        action="store_const",
        const="dense",
        default="",
        help="the average's difference to the dense model's, with its own error if --errors is se",
    )
    parser.add_argument(
        "--against",
        dest="delta",
        metavar="METHOD",
        help="the same to the average of a method at the same ratio",
    )
    asked = parser.parse_args(arguments)
    try:
        runs = runs_below(asked.folder)
    except CameraError as error:
        print(error, file=sys.stderr)
        return 1
    if asked.delta and asked.delta not in set(runs["method"]):
        known = ", ".join(sorted(set(runs["method"])))
        print(f"No run has method={asked.delta}: compare with one of {known}.", file=sys.stderr)
        return 1
    page = paper_page(runs, errors=asked.errors, delta=asked.delta)
    write(runs, asked.folder, page)
    print_page(page)
    return 0
