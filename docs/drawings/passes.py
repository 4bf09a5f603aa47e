"""How a model passes through memory: one layer at a time.

python docs/drawings/passes.py writes docs/figures/passes.svg.
"""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from style import FIGURES, INK, MUTED, OURS, PALE, write

STEPS = (
    ("read", "layer i from disk,\ni + 1 is read ahead"),
    ("measure", "attention, router,\nφ of every expert"),
    ("decide", "rank the pool,\nchoose what stays"),
    ("change", "remove or quantise,\nrefit what stays"),
    ("pass on", "inputs of layer i + 1\nfrom the new layer"),
    ("write", "one shard; a killed\nrun goes on here"),
)


def draw(folder: Path = FIGURES) -> Path:
    """Six boxes in a row, and the way back to the next layer."""
    figure, axes = plt.subplots(figsize=(10.2, 2.3))
    axes.set(xlim=(0, 12.1), ylim=(-0.75, 1.6))
    axes.axis("off")
    for place, (name, what) in enumerate(STEPS):
        left = 2 * place + 0.1
        ours = name in ("decide", "change")
        box = FancyBboxPatch((left, 0.1), 1.7, 1.2, boxstyle="round,pad=0,rounding_size=0.1",
                             facecolor="#fff7ed" if ours else "white",
                             edgecolor=OURS if ours else PALE, linewidth=1.5)  # fmt: skip
        axes.add_patch(box)
        axes.text(left + 0.85, 1.02, name, ha="center", color=OURS if ours else INK, weight="bold")
        axes.text(left + 0.85, 0.75, what, ha="center", va="top", fontsize=7.6, color=INK)
        if place:
            axes.annotate(
                "", (left, 0.7), (left - 0.3, 0.7), arrowprops={"arrowstyle": "->", "color": MUTED}
            )
    back = {"arrowstyle": "->", "color": MUTED, "connectionstyle": "bar,fraction=-0.03"}
    axes.annotate("", (0.95, 0.08), (10.95, 0.08), arrowprops=back)
    axes.text(5.95, -0.5, "the next layer", ha="center", fontsize=9, color=MUTED,
              bbox={"facecolor": "white", "edgecolor": "none"})  # fmt: skip
    return write(figure, "passes", folder)


if __name__ == "__main__":
    print(draw())
