"""What a micro-expert is.

python docs/drawings/micro_expert.py writes docs/figures/micro-expert.svg.
"""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from style import FIGURES, MUTED, OURS, PALE, write

ROWS, COLUMNS, MARKED = 7, 11, 2  # micro-experts, hidden size, the one that is shown
CELL = 0.2


def matrix(axes: Axes, left: float, middle: float, name: str, transposed: bool = False) -> None:
    """A matrix of cells around the height `middle`, with one row, or column, marked."""
    rows, columns = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    bottom, width, height = middle - rows * CELL / 2, columns * CELL, rows * CELL
    axes.add_patch(Rectangle((left, bottom), width, height, facecolor=PALE))
    if transposed:
        place, size = (left + MARKED * CELL, bottom), (CELL, height)
    else:
        place, size = (left, bottom + (rows - 1 - MARKED) * CELL), (width, CELL)
    axes.add_patch(Rectangle(place, *size, facecolor=OURS))
    lines = [left + CELL * column for column in range(1, columns)]
    axes.vlines(lines, bottom, bottom + height, color="white", lw=1.2)
    axes.hlines(
        [bottom + CELL * row for row in range(1, rows)], left, left + width, color="white", lw=1.2
    )
    centre = left + columns * CELL / 2
    axes.text(centre, bottom - 0.12, name, ha="center", va="top", family="monospace")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": MUTED, "lw": 1.4})


def draw(folder: Path = FIGURES) -> Path:
    """The three matrices of an expert, the parts of micro-expert i marked."""
    figure, axes = plt.subplots(figsize=(10.2, 3.6))
    axes.set(xlim=(-0.05, 10.7), ylim=(-0.4, 3.75), aspect="equal")
    axes.axis("off")
    up, down, middle = 2.85, 0.75, 1.8

    axes.text(0.0, middle, "token x", va="center")
    matrix(axes, 1.4, up, "gate_proj")
    matrix(axes, 1.4, down, "up_proj")
    right = 1.4 + COLUMNS * CELL
    for height in (up, down):
        side = 1 if height > middle else -1
        arrow(axes, (0.85, middle + 0.12 * side), (1.32, height))
        row = height + (ROWS / 2 - MARKED - 0.5) * CELL
        axes.text(right + 0.1, row + 0.22 * side, "row i", color=OURS, va="center")
        arrow(axes, (right + 0.06, row), (4.45, middle + 0.18 * side))
    axes.text(4.55, middle + 0.04, "φᵢ", color=OURS, fontsize=20, va="center")
    axes.text(4.45, middle - 0.4, "one number for each token:", fontsize=8.5, color=MUTED, va="top")
    axes.text(4.45, middle - 0.68, "router · act(gateᵢ x) · (upᵢ x)", fontsize=8.5, va="top")
    arrow(axes, (5.15, middle + 0.04), (6.95, middle + 0.04))
    matrix(axes, 7.1, middle, "down_proj", transposed=True)
    column = 7.1 + (MARKED + 0.5) * CELL
    axes.text(column, middle + 1.2, "column i", color=OURS, ha="center", va="bottom")
    arrow(axes, (8.6, middle + 0.04), (9.05, middle + 0.04))
    axes.text(9.15, middle + 0.04, "φᵢ · downᵢ", color=OURS, va="center", fontsize=13)
    axes.text(9.15, middle - 0.3, "added to the\nlayer's output", fontsize=9, color=MUTED, va="top")
    return write(figure, "micro-expert", folder)


if __name__ == "__main__":
    print(draw())
