"""Draw what the runs of an output folder show: of all to DIR/figures, of each to its own folder."""

from __future__ import annotations

import argparse
import sys

from camera.runtime.errors import CameraError
from experiments.config.location import add_output_folder
from experiments.figures.comparison import draw_comparisons
from experiments.figures.run import draw_run
from experiments.records.files import OutputFolder
from experiments.tables.rows import runs_below


def main(arguments: list[str]) -> int:
    """Draw the figures over all runs to DIR/figures, and those of each run in its own folder."""
    parser = argparse.ArgumentParser(prog="camera figures", description=__doc__)
    add_output_folder(parser)
    folder = parser.parse_args(arguments).folder
    try:
        runs = runs_below(folder)
    except CameraError as error:
        print(error, file=sys.stderr)
        return 1
    drawn = draw_comparisons(runs, OutputFolder(folder).figures)
    for run in runs["_path"]:
        drawn += draw_run(run)
    for file in drawn:
        print(f"{file} and .pdf")
    if not drawn:
        print(f"The runs of {folder} have nothing to draw yet.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
