"""Which of several sizes each layer takes, so that the summed error is least within a budget.

Shapes: L layers, B sizes of each.
"""

from collections.abc import Sequence

import torch

from camera.runtime.errors import CameraError


def least_error(
    cost_LB: Sequence[Sequence[int]], error_LB: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """The size of each layer that minimises sum_l error[l][b_l], s.t. sum_l cost[l][b_l] <= budget.

    Exact, by dynamic programming over layers: of all plans of the first layers those stay that no
    other beats in both cost and error. Of plans of equal error the cheapest wins. CameraError for a
    budget below the cheapest plan.
    """
    if budget < sum(map(min, cost_LB)):
        raise CameraError(f"the fewest bits of every layer take more than {budget} bits.")
    cost_P, error_P = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps, left = [], sum(map(min, cost_LB))
    for costs, errors in zip(cost_LB, error_LB, strict=True):
        left -= min(costs)
        sizes = len(costs)
        cost_PB = (cost_P[:, None] + torch.tensor(costs)).flatten()
        error_PB = (error_P[:, None] + torch.tensor(errors, dtype=torch.float64)).flatten()
        kept = _unbeaten(cost_PB, error_PB)
        kept = kept[cost_PB[kept] + left <= budget]
        cost_P, error_P = cost_PB[kept], error_PB[kept]
        steps.append((kept // sizes, kept % sizes))
    place, choice = len(cost_P) - 1, []
    for before, size in reversed(steps):
        choice.append(int(size[place]))
        place = int(before[place])
    return choice[::-1]


def _unbeaten(cost_P: torch.Tensor, error_P: torch.Tensor) -> torch.Tensor:
    """Plans by rising cost whose error is below that of every cheaper one: int64 positions."""
    order = torch.argsort(error_P, stable=True)
    order = order[torch.argsort(cost_P[order], stable=True)]
    least = error_P[order].cummin(0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = error_P[order[1:]] < least[:-1]
    return order[better]


def next_cost(cost_LB: Sequence[Sequence[int]], choice: Sequence[int], budget: int) -> float:
    """The least cost above the budget of the plans that change one layer."""
    total = sum(costs[b] for costs, b in zip(cost_LB, choice, strict=True))
    others = [
        total - costs[b] + cost for costs, b in zip(cost_LB, choice, strict=True) for cost in costs
    ]
    return min((cost for cost in others if cost > budget), default=float("inf"))
