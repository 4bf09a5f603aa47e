"""One HTML page about the runs of an output folder."""

from __future__ import annotations

import argparse
import sys

from camera.runtime.errors import CameraError
from experiments.config.location import add_output_folder, user_folder
from experiments.records.files import OutputFolder
from experiments.report.writing import write_report
from experiments.tables.rows import runs_below


def main(arguments: list[str]) -> int:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(prog="camera report", description=__doc__)
    add_output_folder(parser)
    parser.add_argument("--out", type=user_folder, help="the page (default: DIR/report.html)")
    asked = parser.parse_args(arguments)
    try:
        runs = runs_below(asked.folder)
    except CameraError as error:
        print(error, file=sys.stderr)
        return 1
    print(write_report(runs, asked.folder, asked.out or OutputFolder(asked.folder).report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
