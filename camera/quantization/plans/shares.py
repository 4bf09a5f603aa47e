"""Groups of micro-experts of equal bits: their bits, and what share of a ranking each may have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import floor

from camera.checkpoint.formats.packed.codes import MAX_BITS
from camera.checkpoint.formats.packed.footprint import StoredBits
from camera.runtime.errors import CameraError


def levels_around(bits: float, footprints: Sequence[StoredBits]) -> list[int]:
    """Three bit widths; the middle one, if all have it, stores closest to `bits`. None is 0."""
    weights = max(sum(part.weights for part in footprints), 1)

    def distance(width: int) -> float:
        stored = sum(part.uniform_average(width) * part.weights for part in footprints)
        return abs(stored / weights - bits)

    middle = min(range(2, MAX_BITS), key=distance)
    return [middle + 1, middle, middle - 1]


def check_levels(levels: Sequence[int]) -> None:
    """CameraError for bits of groups that can't be stored, or not in falling order."""
    storable = set(levels) & set(range(MAX_BITS + 1))
    if list(levels) != sorted(storable, reverse=True) or not any(levels):
        raise CameraError(
            f"group_bits={levels} must be different bits from {MAX_BITS} to 0, the most first."
        )


def check_shares(
    levels: Sequence[int],
    ratios: Sequence[float] | None,
    low_share: float | None,
    bits: float | None,
    rank_scope: str,
) -> None:
    """CameraError for shares of the groups that don't add up, or that nothing decides."""
    if low_share is not None and not 0 <= low_share <= 1:
        raise CameraError(f"low_share={low_share} must lie between 0 and 1.")
    if ratios is None:
        if bits is None and len(levels) > 1:
            raise CameraError("bits=null leaves the shares open: set ratios.")
        if low_share is not None:
            share_corners(levels, 0, low_share)  # refuses more groups than can be solved
        elif rank_scope == "global" and len(levels) > 1:
            raise CameraError(
                "errors are measured layer by layer: with rank_scope=global set low_share or "
                "ratios."
            )
    elif len(ratios) != len(levels) or min(ratios) < 0:
        raise CameraError(f"ratios={list(ratios)} must be a share for each of group_bits={levels}.")
    elif abs(sum(ratios) - 1) > 1e-6:
        raise CameraError(f"ratios={list(ratios)} must add up to 1.")


def boundaries_of(ratios: Sequence[float], micro_experts: int) -> list[int]:
    """Where the groups of these shares end in a ranking, those below rounded down as Camera-P's."""
    below = accumulate(reversed(ratios[1:]))
    return [micro_experts - floor(share * micro_experts + 1e-9) for share in below][::-1]


def share_corners(
    levels: Sequence[int], micro_experts: int, low_share: float
) -> list[tuple[int, ...]]:
    """Corners of the way from all-lowest to all-highest on which shares are solved.

    Two levels: the better group grows. Three: from all-lowest the middle group grows until
    `low_share` is left of the lowest, then the highest takes over the middle, then the lowest.
    """
    n = micro_experts
    if len(levels) == 1:
        return [()]
    if len(levels) == 2:
        return [(0,), (n,)]
    if len(levels) == 3:
        kept = n - round(low_share * n)
        return [(0, 0), (0, kept), (kept, kept), (n, n)]
    raise CameraError("group_bits of more than three groups need their shares: set ratios too.")
