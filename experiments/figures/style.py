"""One look for all figures: readable in print, in grey, and to colour-blind eyes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells of every font that a PDF gets

ORDERED = "cividis"  # its lightness rises with the value, for colour-blind eyes too
ABSENT = "#d9d9d9"
GREY = "#595959"
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # text stays text
}
# Okabe & Ito's colours without the yellow, which is too light on paper.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000", "#8c8c8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p", "d", "x", "+")
LINES = ("-", "--", ":", "-.")
# A method has the same colour and marker in every figure.
METHODS = ("camera_p", "heapr", "d2_moe", "magnitude", "reap", "naee", "frequency", "random")
METHODS += ("camera_q", "gptq", "mc", "camera_q_dagger", "rtn", "camera_plus", "dense")


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn; markers tell apart what shares a colour."""

    colour: str
    marker: str


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """A look for each method; the ones that this file doesn't know come last, by name."""
    asked = set(methods)
    everyone = [*METHODS, *sorted(asked - {*METHODS})]
    return {
        method: MethodStyle(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, method in enumerate(everyone)
        if method in asked
    }


def save(figure: plt.Figure, file: Path) -> Path:
    """Write the figure to `file`, a PNG, and to the PDF of the same name; close it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # found once, it serves both files
    # The date would make files differ that show the same.
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", None)):
        target = file.with_suffix(f".{kind}")
        part = target.with_name(f".{target.name}")
        figure.savefig(part, format=kind, metadata=metadata)
        part.replace(target)
    plt.close(figure)
    return file
