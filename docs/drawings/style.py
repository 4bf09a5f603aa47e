"""How the drawings of README and docs/ look, and how they are written."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

FIGURES = Path(__file__).parent.parent / "figures"
INK, MUTED, OURS, SECOND, PALE = "#222222", "#6b7280", "#c2410c", "#1d4ed8", "#e5e7eb"

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # letters stay text, which scales and can be searched
        "svg.hashsalt": "camera",  # the same drawing gives the same file
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def write(figure: Figure, name: str, folder: Path = FIGURES, description: str = "") -> Path:
    """The figure as an SVG on white, readable on a dark page too, with a description inside."""
    file = folder / f"{name}.svg"
    figure.savefig(
        file,
        facecolor="white",
        bbox_inches="tight",
        metadata={"Date": None, "Description": description},
    )
    return file
