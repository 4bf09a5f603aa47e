"""How many micro-experts each layer gives, from the cost of pruning each on trial.

Any change makes later routers send some tokens elsewhere; that costs much the same however little
is cut, and is paid once, whichever layer is cut. So a curve starts where its first two trials point
to, if that is above zero. Between the trials cost is interpolated without overshoot (PCHIP, Fritsch
and Carlson 1980); then what is cheapest goes first, along the lower convex hull of every layer's
curve, until enough is gone. Where hulls are met this is the least sum of costs there is; a layer in
between gives a part of a hull's edge.
"""

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

STEPS = 256  # of a layer's curve


def allocate(
    removed: Sequence[Sequence[int]], cost: Sequence[Sequence[float]], total: int, unit: int = 1
) -> list[int]:
    """How many of each layer's micro-experts go so that `total` go in all, at the least cost.

    `removed` and `cost` are each layer's trial cuts in rising order; none goes beyond the last.
    All but one layer's numbers are multiples of `unit`, except where a layer gives all it may.
    """
    edges = []
    for layer, (counts, costs) in enumerate(zip(removed, cost, strict=True)):
        x, y = _hull(*_curve(counts, costs, unit))
        slopes = np.diff(y) / np.diff(x)
        edges += [(s, layer, int(n)) for s, n in zip(slopes, np.diff(x), strict=True)]
    gone, left = [0] * len(removed), total
    for _, layer, most in sorted(edges):
        taken = min(most, left)
        gone[layer] += taken
        left -= taken
    return gone


def _curve(counts: Sequence[int], costs: Sequence[float], unit: int) -> tuple[np.ndarray, ...]:
    x, first = np.unique([0, *counts], return_index=True)
    y = np.maximum.accumulate(np.array([0.0, *costs])[first])
    if len(x) == 1:
        return x, y
    if len(x) > 2:
        y[0] = max(0.0, y[1] - x[1] * (y[2] - y[1]) / (x[2] - x[1]))
    step = unit * -(-int(x[-1]) // (unit * STEPS))
    grid = np.append(np.arange(0, x[-1], step), x[-1])
    return grid, PchipInterpolator(x, y)(grid)


def _hull(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the lower convex hull of points in rising order of x."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return x[corners], y[corners]
