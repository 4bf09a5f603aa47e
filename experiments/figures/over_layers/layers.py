"""The layers of a model on an axis, and its experts by layer and kind."""

from __future__ import annotations

import re

from matplotlib import pyplot as plt

from camera.moe.families import is_routed

LABELLED = 16  # layers, or experts, that get a number


def layers_height(layers: list[int]) -> float:
    """Inches of a figure with one row per layer: of 48 layers a row is a third as high as of 6."""
    return 1.0 + max(1.2, min(0.17 * len(layers), 3.0))


def label_layers(axes: plt.Axes, layers: list[int]) -> None:
    """Number the rows of the y axis by layer, at most about sixteen of them."""
    step = max(1, -(-len(layers) // LABELLED))
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")


def by_layer(
    values: dict[str, list[float]],
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """By layer the values of shared experts (and dense FFNs), and those of routed ones."""
    shared: dict[int, list[float]] = {}
    routed: dict[int, list[float]] = {}
    for path in sorted(values):
        kept = routed if is_routed(path) else shared
        kept.setdefault(layer_of(path), []).extend(values[path])
    return shared, routed


def layer_of(path: str) -> int:
    """The layer that a module path names by the first number in it; 0 where there is none."""
    number = re.search(r"\.(\d+)(\.|$)", path)
    return int(number.group(1)) if number else 0
