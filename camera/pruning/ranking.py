"""Pruning plans: which micro-experts of a layer's pool stay. Pure functions of scores and a budget.

Shapes: N micro-experts of a layer's pool, E experts of the pool.
"""

from math import ceil

import torch


def keep_highest(
    score_N: torch.Tensor,
    widths: list[int],
    remove: int,
    *,
    width_multiple: int = 1,
    min_width: int = 0,
    candidates_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool [N]: all but the `remove` lowest-scored micro-experts; of equals the first goes first.

    `candidates_N` marks those that may go at all. With `min_width` every expert keeps that many of
    its highest. With `width_multiple` m an expert is cut into blocks of m by descending score and
    whole blocks stay or go, the blocks of lowest mean score first, as many as fit into `remove`:
    kept widths are then multiples of m or the full width, and never fewer in all than without m.
    """
    ascending_N = torch.argsort(score_N, stable=True)
    if width_multiple == 1 and min_width == 0:
        if candidates_N is not None:
            ascending_N = ascending_N[candidates_N[ascending_N]]
        keep_N = torch.ones(len(score_N), dtype=torch.bool)
        keep_N[ascending_N[:remove]] = False
        return keep_N
    return _keep_blocks(score_N, widths, remove, width_multiple, min_width, candidates_N)


def below_floor(score_N: torch.Tensor, floor: float) -> torch.Tensor:
    """bool [N]: all but the highest-scored share `floor` of a layer, which is to stay."""
    free_N = torch.ones(len(score_N), dtype=torch.bool)
    protected = ceil(floor * len(score_N) - 1e-9)
    free_N[torch.argsort(score_N, stable=True)[len(score_N) - protected :]] = False
    return free_N


def _keep_blocks(score_N, widths, remove, multiple, min_width, candidates_N) -> torch.Tensor:
    blocks: list[tuple[float, int, torch.Tensor]] = []
    start = 0
    for width in widths:
        rows = torch.arange(start, start + width)
        start += width
        # ascending and stable, then reversed: of equals the first ones are the first to go
        best_first = rows[torch.argsort(score_N[rows], stable=True)].flip(0)
        protected = -(-min(min_width, width) // multiple) * multiple
        for first in range(protected, width, multiple):
            block = best_first[first : first + multiple]
            if candidates_N is None or candidates_N[block].all():
                blocks.append((score_N[block].double().sum().item() / len(block), -first, block))
    keep_N = torch.ones(len(score_N), dtype=torch.bool)
    # mean score is not increasing along an expert's blocks, so an expert loses its last ones first
    for _, _, block in sorted(blocks, key=lambda item: item[:2]):
        if len(block) <= remove:
            keep_N[block] = False
            remove -= len(block)
        elif remove < multiple:
            break
    return keep_N
