"""Size against quality on a real language model, from the tables of docs/results.md.

python docs/drawings/size_and_quality.py writes docs/figures/size-and-quality.svg.
"""

import re
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from style import FIGURES, INK, MUTED, OURS, SECOND, write

RESULTS = FIGURES.parent / "results.md"
LOOKS = {  # by method: colour and marker
    "Camera-Plus": (OURS, "o"),
    "Camera-P": ("#f59e0b", "s"),
    "Camera-Q": (OURS, "o"),
    "HEAPr": (SECOND, "^"),
    "GPTQ": (SECOND, "^"),
    "Random": (MUTED, "x"),
    "RTN": (MUTED, "x"),
}
Rows = list[dict[str, str]]


def table(name: str, page: Path = RESULTS) -> Rows:
    """The rows of a table of the page that stands between comments of this name."""
    text = page.read_text(encoding="utf-8")
    inside = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    if not inside:
        raise SystemExit(f"{page} has no table {name}.")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in inside[1].splitlines()
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def number(cell: str) -> float:
    """The value of a cell."""
    return float(re.sub(r"[,%]", "", cell))


def points(rows: Rows, method: str, x: str) -> list[tuple[float, float]]:
    """(x, perplexity of WikiText-2) of a method by its default settings."""
    mine = [row for row in rows if row["Method"] == method and not row.get("Settings")]
    return [(number(row[x]), number(row["Wiki2"])) for row in mine]


def panel(axes: Axes, rows: Rows, methods: tuple[str, ...], x: str) -> str:
    """A curve for each method, and the dense model as a line; the points in words."""
    (dense,) = [number(row["Wiki2"]) for row in rows if row["Method"] == "Dense"]
    axes.axhline(dense, color=INK, lw=1, ls=(0, (4, 3)))
    place = axes.get_yaxis_transform()
    axes.text(
        0.5, dense / 1.06, f"dense {dense:.1f}", ha="center", va="top", fontsize=9, transform=place
    )
    told = [f"dense {dense}"]
    for method in methods:
        colour, marker = LOOKS[method]
        found = sorted(points(rows, method, x))
        if x == "Experts removed":
            found = [(0.0, dense), *found] if len(found) > 1 else found
        told.append(f"{method} " + ", ".join(f"{at:g}: {value:g}" for at, value in found))
        axes.plot(*zip(*found, strict=True), f"{marker}-", color=colour, label=method, lw=1.8)
    axes.set(yscale="log", ylabel="perplexity, WikiText-2 (lower is better)")
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10)
    return "; ".join(told)


def draw(folder: Path = FIGURES, page: Path = RESULTS) -> Path:
    """Pruning on the left, quantisation on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8), layout="constrained")
    pruned = ("Camera-Plus", "Camera-P", "HEAPr", "Random")
    first = panel(left, table("smollm2", page), pruned, "Experts removed")
    left.set(
        title="SmolLM2-135M, pruned",
        xlabel="removed from the feed-forward layers, %",
        ylim=(9, 4e3),
    )
    coded = table("smollm2-quantisation", page)
    second = panel(right, coded, ("Camera-Q", "GPTQ", "RTN"), "Stored bits")
    right.set(
        title="SmolLM2-135M, quantised",
        xlabel="stored bits per weight, scales included",
        ylim=(9, 5e5),
    )
    for axes in (left, right):
        axes.set_yticks([10, 100, 1e3, 1e4, 1e5][: 3 if axes is left else 5])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
    return write(figure, "size-and-quality", folder, f"{first}. {second}.")


if __name__ == "__main__":
    print(draw())
