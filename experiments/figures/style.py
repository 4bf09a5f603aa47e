"""One look for all figures: readable in print, in grey, to colour-blind eyes and on a dark page."""

from __future__ import annotations

import io
import logging
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from experiments.figures.words import Heading
from experiments.records.files import write_text

logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells of every font that a PDF gets

COLUMN, PAGE = 3.35, 6.9  # inches: a column, and both, of a paper in two columns
DPI = 250
ORDERED = "cividis"  # its lightness rises with the value, for colour-blind eyes too
ABSENT = "#d9d9d9"
PAPER, INK, GREY, GRID = "#ffffff", "#1b1f24", "#595959", "#e6e6e6"
STYLE = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.labelspacing": 0.3,
    "legend.handlelength": 2.6,  # a dash pattern and the marker in its middle can both be seen
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "camera",  # the same figure is the same bytes
    "text.parse_math": False,  # a $ in the name of a method is a $
}
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
HEAD_POINTS, WORDS_POINTS = 8.5, 6.8
LEGEND_LINE = 0.15  # inches
HANDLE = 6  # letters that a line and its marker take beside a label
PAD = 0.07
LEADING = 1.3 / 72  # inches of a line for each point of its letters
# Okabe & Ito's colours without the yellow, which is too light on paper.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", INK, "#8c8c8c")
Marker = str | tuple[int, int, int]  # Matplotlib's name, or corners, 1 for a star, degrees
MARKERS: tuple[Marker, ...] = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p", "d")
MARKERS += ("8", "H", (4, 1, 45), (3, 1, 0))
LINES = ("-", "--", ":", "-.")
# What a colour is on a dark page; colours that aren't here serve on both.
DARK = {
    PAPER: "#14171b",
    INK: "#e4e8ed",
    GREY: "#9aa5b1",
    GRID: "#2b3139",
    "#d55e00": "#f07b2a",
    "#0072b2": "#4aa3df",
    "#009e73": "#2dbd92",
}
# A method has the same colour and marker in every figure.
METHODS = ("camera_p", "heapr", "d2_moe", "magnitude", "reap", "naee", "frequency", "random")
METHODS += ("camera_q", "gptq", "mc", "camera_q_dagger", "rtn", "camera_plus")
METHODS += ("layerwise_bits", "aimer", "mone")


@dataclass(frozen=True)
class Look:
    """How a method, or a variant of it, is drawn."""

    colour: str
    marker: Marker
    line: str = "-"
    filled: bool = True

    @property
    def face(self) -> str:
        """What the marker is filled with."""
        return self.colour if self.filled else PAPER


DENSE = Look(GREY, "D")  # what the others are compared with


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method; the ones that this file doesn't know come last, by name."""
    asked = set(methods)
    everyone = [*METHODS, *sorted(asked - {*METHODS, "dense"})]
    found = {
        method: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, method in enumerate(everyone)
    }
    found["dense"] = DENSE
    return {method: look for method, look in found.items() if method in asked}


def variant_of(look: Look, variant: int) -> Look:
    """The look of a method's variant: its colour, and a marker and a line of its own."""
    shape = (MARKERS.index(look.marker) + variant // 2) % len(MARKERS)
    line = LINES[variant % len(LINES)]
    return Look(look.colour, MARKERS[shape], line, filled=variant % 2 == 0)


def canvas(
    heading: Heading, width: float, height: float, rows: int = 1
) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    """A figure below its heading, and its axes; the heading's lines come on top of `height`."""
    words = textwrap.wrap(heading.words, int(18.5 * width))
    above = LEADING * (HEAD_POINTS + WORDS_POINTS * len(words)) + 0.06
    figure, axes = plt.subplots(rows, figsize=(width, height + above), squeeze=False)
    rect = (0, 0, 1, height / (height + above))
    figure.get_layout_engine().set(rect=rect, w_pad=PAD)  # letters of a PDF are wider than a PNG's
    figure.set_label(": ".join(filter(None, (heading.head, heading.words))))
    _write_heading(figure, heading.head, words)
    return figure, axes[:, 0]


def _write_heading(figure: plt.Figure, head: str, words: Sequence[str]) -> None:
    lines = [(head, HEAD_POINTS, INK, "bold"), *((w, WORDS_POINTS, GREY, "normal") for w in words)]
    height, down = figure.get_figheight(), 0.04
    for text, points, colour, weight in lines:
        place = (0.04 / figure.get_figwidth(), 1 - down / height)
        figure.text(*place, text, size=points, color=colour, weight=weight, va="top")
        down += LEADING * points


def legend(figure: plt.Figure, spare: int = 2) -> None:
    """Below the figure, so that it hides nothing, in as many columns as labels leave room for.

    Beyond `spare` lines the figure grows with it, so that what it shows keeps its size. A label
    that is longer than the figure is wide goes on in another line.
    """
    handles, labels = figure.axes[0].get_legend_handles_labels()
    longest, room = max(map(len, labels), default=0), int(17 * figure.get_figwidth())
    columns = max(1, min(4, room // (longest + HANDLE)))
    labels = [textwrap.fill(label, room - HANDLE) for label in labels]
    lines = -(-len(labels) // columns) + sum(label.count("\n") for label in labels)
    _grow(figure, LEGEND_LINE * max(lines - spare, 0))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _grow(figure: plt.Figure, by: float) -> None:
    before = figure.get_figheight()
    above = before * (1 - figure.get_layout_engine().get()["rect"][3])
    after = before + by
    figure.set_figheight(after)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - above / after))
    for text in figure.texts:
        text.set_y(1 - (1 - text.get_position()[1]) * before / after)


def power_of_ten(power: float) -> str:
    """10 to that power, in raised digits."""
    return f"10{f'{power:g}'.translate(RAISED)}"


def save(figure: plt.Figure, file: Path) -> Path:
    """Write the figure to `file`, a PNG, and to the PDF and the SVG of the same name; close it.

    Each has its heading as its title. The SVG has the colours of the page that shows it, light or
    dark.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"Title": figure.get_label()}
    drawing = io.StringIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is boxes, but in the SVG: no matter of the run's.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # found once, it serves all files
        # The date would make files differ that show the same.
        for kind, metadata in (("pdf", told | {"CreationDate": None}), ("png", told)):
            target = file.with_suffix(f".{kind}")
            part = target.with_name(f".{target.name}")
            figure.savefig(part, format=kind, metadata=metadata)
            part.replace(target)
        figure.savefig(drawing, format="svg", metadata=told | {"Date": None})
    write_text(file.with_suffix(".svg"), for_both_schemes(drawing.getvalue()))
    plt.close(figure)
    return file


def for_both_schemes(drawing: str) -> str:
    """An SVG whose colours are those of DARK where a dark page is preferred."""
    variables = {colour: f"--c{colour[1:]}" for colour in DARK}
    light = "".join(f"{name}:{colour};" for colour, name in variables.items())
    dark = "".join(f"{name}:{DARK[colour]};" for colour, name in variables.items())
    style = f"svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"

    def of_the_page(attribute: re.Match[str]) -> str:
        return re.sub(
            r"#[0-9a-f]{6}\b",
            lambda c: f"var({variables[c[0]]})" if c[0] in variables else c[0],
            attribute[0],
        )

    drawing = re.sub(r'style="[^"]*"', of_the_page, drawing)
    return re.sub(r'(<style type="text/css">)', lambda tag: tag[1] + style, drawing, count=1)
