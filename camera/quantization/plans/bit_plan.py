"""Bit plans: how many bits each micro-expert gets. Pure functions of scores and a byte budget.

Shapes: N micro-experts of a pool (of a layer, or of several layers one after the other), E experts
of the pool, B bit widths in descending order ("levels"), C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from camera.checkpoint.formats.packed.footprint import StoredBits
from camera.quantization.plans.shares import share_corners
from camera.runtime.errors import CameraError

SCOPES = ("layer", "expert", "global")
GROUP_STEP = 8  # group sizes that are solved for are multiples of it
NEAR, PROBES = 0.005, 32  # how far below a budget a plan may stay before more are tried, how many

Stored = Callable[[torch.Tensor, Sequence[int]], float]
"""stored(bits_N, cuts): bits on disk of a plan that cuts the ranking there."""


def ranking(score_N: torch.Tensor, widths: Sequence[int], scope: str) -> torch.Tensor:
    """The order in which micro-experts get bits, best first; of equals the first goes first.

    layer (and global, for a pool of several layers): by score over the whole pool. expert: by rank
    within its expert, (rank + 1/2) / width, so that any prefix takes the same share of each.
    """
    if scope != "expert":
        return torch.argsort(score_N, descending=True, stable=True)
    place_N = torch.empty(len(score_N), dtype=torch.float64)
    for rows in torch.arange(len(score_N)).split(list(widths)):
        order = torch.argsort(score_N[rows], descending=True, stable=True)
        place_N[rows[order]] = (torch.arange(len(rows)) + 0.5).double() / max(len(rows), 1)
    return torch.argsort(place_N, stable=True)


def bits_of_ranking(
    order_N: torch.Tensor,
    widths: Sequence[int],
    levels: Sequence[int],
    cuts: Sequence[int],
    align: int = 1,
) -> torch.Tensor:
    """Bits by micro-expert: the first cuts[0] of the order get levels[0], up to cuts[1] the next.

    With `align` every boundary inside an expert is rounded to a multiple, so that segments of the
    bit widths hold whole groups.
    """
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N))
    if align == 1:
        return _levels_at(rank_N, levels, cuts)
    bits_N = torch.empty_like(order_N)
    for rows in torch.arange(len(order_N)).split(list(widths)):
        ranks, width = rank_N[rows], len(rows)
        inside = [int((ranks < cut).sum()) for cut in cuts]
        inside = [min((n + align // 2) // align * align, width) for n in inside]
        bits_N[rows[torch.argsort(ranks)]] = _levels_at(torch.arange(width), levels, inside)
    return bits_N


def _levels_at(rank: torch.Tensor, levels: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    below = torch.bucketize(rank, torch.tensor(list(cuts), dtype=torch.int64), right=True)
    return torch.tensor(list(levels))[below]


def solve_boundaries(
    corners: Sequence[tuple[int, ...]], stored: Callable[[tuple[int, ...]], float], budget: float
) -> tuple[int, ...]:
    """The furthest point of a way whose plan takes at most `budget` bits.

    Every step along the way moves one micro-expert up. That mostly costs bits, but a new segment
    needs scales at once, so where bisection ends below budget the way beyond is probed, too.
    CameraError if the beginning is too much.
    """
    lengths = [
        max((b - a for a, b in zip(here, there, strict=True)), default=0)
        for here, there in _pairs(corners)
    ]
    total = sum(lengths)

    def fits(step: int) -> bool:
        return stored(_at(corners, lengths, step)) <= budget

    def furthest(low: int, high: int) -> int:
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    if not fits(0):
        raise CameraError("a plan's lowest bits already take more than the target `bits`.")
    found = furthest(0, total)
    if stored(_at(corners, lengths, found)) < budget * (1 - NEAR):
        probes = [found + (total - found) * k // PROBES for k in range(1, PROBES + 1)]
        later = [k for k, step in enumerate(probes) if step > found and fits(step)]
        if later:
            found = furthest(probes[later[-1]], [*probes, total][later[-1] + 1])
    return _at(corners, lengths, found)


def _pairs(corners: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return list(pairwise(corners))


def _at(corners: Sequence[tuple[int, ...]], lengths: list[int], step: int) -> tuple[int, ...]:
    for (here, there), length in zip(_pairs(corners), lengths, strict=True):
        if step <= length and length:
            # rounded alike for all cuts, which therefore stay in order
            return tuple(a + (b - a) * step // length for a, b in zip(here, there, strict=True))
        step -= length
    return corners[-1]


def solve_shares(
    order_N: torch.Tensor,
    footprint: StoredBits,
    levels: Sequence[int],
    bits: float,
    *,
    low_share: float,
    align: int = 1,
    stored: Stored | None = None,
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The plan of groups whose stored average comes closest to `bits` from below, and its cuts.

    `low_share` of the micro-experts get the lowest bits; the share of the highest is solved, and
    where no share of it does, the others give way (`share_corners`).
    """
    at = _stored_at(order_N, footprint, levels, align, stored)
    corners = share_corners(levels, len(order_N), low_share)
    cuts = solve_boundaries(corners, at, _budget(footprint, bits))
    return bits_of_ranking(order_N, footprint.widths, levels, cuts, align), cuts


def solve_optimal(
    score_N: torch.Tensor,
    order_N: torch.Tensor,
    footprint: StoredBits,
    errors: dict[int, float],
    bits: float,
    *,
    align: int = 1,
    stored: Stored | None = None,
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The plan of least predicted error sum_i score_i * errors[b_i] within the budget; its cuts.

    errors: what share of a micro-expert's energy is lost at a number of bits (0 bits: 1.0). For a
    multiplier lambda each micro-expert takes the b that makes score_i * errors[b] +
    lambda * cost(b) smallest; lambda is solved so that the exact stored bits stay within budget.
    """
    levels = sorted(errors, reverse=True)
    error_B = torch.tensor([errors[b] for b in levels], dtype=torch.float64)
    whole = replace(footprint, widths=(1 << 20,))
    cost_B = torch.tensor([whole.uniform_average(b) for b in levels], dtype=torch.float64)
    score_N = score_N.double()[order_N]

    def cuts(multiplier: float) -> tuple[int, ...]:
        choice_N = (score_N[:, None] * error_B + multiplier * cost_B).argmin(1)
        # `expert` scope ranks otherwise than by score: the shares count, the ranking decides who
        counts = torch.bincount(choice_N, minlength=len(levels)).tolist()
        return tuple(accumulate(counts))[:-1]

    at = _stored_at(order_N, footprint, levels, align, stored)
    budget = _budget(footprint, bits)
    top = float(score_N.max()) if len(score_N) else 0.0
    loose, tight = 0.0, max(top, torch.finfo(torch.float64).tiny)
    if at(cuts(loose)) <= budget:
        return bits_of_ranking(order_N, footprint.widths, levels, cuts(loose), align), cuts(loose)
    while at(cuts(tight)) > budget and tight < 1e300:
        tight *= 4
    for _ in range(100):
        middle = (loose * tight) ** 0.5 if loose else tight * 1e-3
        loose, tight = (loose, middle) if at(cuts(middle)) <= budget else (middle, tight)
        if loose and tight <= loose * (1 + 1e-12):
            break
    # micro-experts of equal score change together: go as far between both plans as fits
    whole = (len(score_N),) * (len(levels) - 1)  # beyond, where scales come in steps
    found = solve_boundaries([cuts(tight), cuts(loose), whole], at, budget)
    return bits_of_ranking(order_N, footprint.widths, levels, found, align), found


def next_stored(
    order_N: torch.Tensor,
    footprint: StoredBits,
    levels: Sequence[int],
    cuts: Sequence[int],
    bits: float,
    *,
    align: int = 1,
    stored: Stored | None = None,
) -> float:
    """The least stored average above `bits` of the plans that move one of these cuts up."""
    at, ends = _stored_at(order_N, footprint, levels, align, stored), [*cuts[1:], len(order_N)]
    budget, found = _budget(footprint, bits), []
    for j, (cut, end) in enumerate(zip(cuts, ends, strict=True)):
        steps = (min(cut + (1 << k), end) for k in range((end - cut).bit_length() + 1))
        plans = (at((*cuts[:j], step, *cuts[j + 1 :])) for step in steps)
        found.append(next((size for size in plans if size > budget), float("inf")))
    return min(found, default=float("inf")) / max(footprint.weights, 1)


def solve_group_size(
    stored: Callable[[int], float], weights: int, bits: float, columns: int
) -> int | None:
    """The smallest group size, a multiple of 8 up to a whole row, that keeps within `bits`."""
    for size in range(GROUP_STEP, columns + GROUP_STEP, GROUP_STEP):
        if stored(size) <= bits * weights * (1 + 1e-9):
            return size
    return None


def _budget(footprint: StoredBits, bits: float) -> float:
    return bits * footprint.weights * (1 + 1e-9)


def _stored_at(
    order_N: torch.Tensor,
    footprint: StoredBits,
    levels: Sequence[int],
    align: int,
    stored: Stored | None,
) -> Callable[[tuple[int, ...]], float]:
    def at(cuts: tuple[int, ...]) -> float:
        bits_N = bits_of_ranking(order_N, footprint.widths, levels, cuts, align)
        return footprint.total(bits_N) if stored is None else stored(bits_N, cuts)

    return at
