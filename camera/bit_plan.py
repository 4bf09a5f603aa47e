"""Bit plans: how many bits each micro-expert gets. Pure functions of scores and a byte budget.

Shapes: N micro-experts of a pool (of a layer, or of several layers one after the other), E experts
of the pool, B bit widths in descending order ("levels"), C columns of a matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import floor

import torch

from camera.errors import CameraError

SCOPES = ("layer", "expert", "model")
MOST_BITS = 8
GROUP_STEP = 8  # group sizes that are solved for are multiples of it

Stored = Callable[[torch.Tensor, Sequence[int]], float]
"""stored(bits_N, cuts): bits on disk of a plan that cuts the ranking there."""


def metadata_bits(bits: int, sym: bool = False) -> int:
    """Stored bits beside the codes of one group: scale and zero in 16 bits each.

    The 1-bit and the symmetric grids know their zero; 0 bits store nothing.
    """
    return 0 if bits == 0 else 16 if bits == 1 or sym else 32


def index_bits(length: int) -> int:
    """Stored bits of an order of so many rows or columns."""
    return length * (16 if length <= 2**15 else 32)


@dataclass(frozen=True)
class Footprint:
    """What the quantised experts of a pool take on disk, in bits, metadata included.

    A line of n codes of b bits in groups of g takes n b + ceil(n / g) m(b), m of `metadata_bits`;
    codes of one segment of an expert fill whole bytes, as camera/experts/packed_matrix.py stores
    them. `widths` are those of every expert, `group_size` None is one group per line; `scattered`
    matrices, whose groups aren't neighbours, store the order of their columns too.
    """

    hidden: int
    widths: tuple[int, ...]
    group_size: int | None = 128
    sym: bool = False
    scattered: bool = False

    @property
    def weights(self) -> int:
        """Weights of the pool: gate, up and down of every micro-expert."""
        return 3 * self.hidden * sum(self.widths)

    @property
    def micro_experts(self) -> int:
        return sum(self.widths)

    def counts(self, bits_N: torch.Tensor) -> torch.Tensor:
        """Micro-experts of each expert (row) at 0, 1, ... 8 bits (column), int64."""
        levels, experts = MOST_BITS + 1, len(self.widths)
        expert_N = torch.repeat_interleave(torch.arange(experts), torch.tensor(self.widths))
        return torch.bincount(expert_N * levels + bits_N, minlength=experts * levels).view(
            experts, levels
        )

    def stored(self, bits_N: torch.Tensor) -> int:
        """Bits of a plan by micro-expert: rows of gate and up, column segments of down."""
        return self._stored(self.counts(bits_N))

    def _stored(self, counts_EB: torch.Tensor) -> int:
        hidden_EB = torch.full_like(counts_EB, self.hidden)
        gate_up = self.segments(2 * counts_EB, hidden_EB)
        total = gate_up + self.segments(hidden_EB * (counts_EB > 0), counts_EB)
        if self.scattered:
            total += 2 * len(self.widths) * index_bits(self.hidden)
            total += sum(map(index_bits, self.widths))
        return total

    def stored_by_columns(self, gate_up_EB: torch.Tensor, down_EB: torch.Tensor) -> int:
        """Bits where gate and up are cut by their input columns too, and store the columns' order.

        The numbers of columns of each expert at 0, 1, ... 8 bits.
        """
        width_EB = torch.tensor(self.widths)[:, None]
        hidden_EB = torch.full_like(down_EB, self.hidden)
        gate_up = self.segments(2 * width_EB * (gate_up_EB > 0), gate_up_EB)
        down = self.segments(hidden_EB * (down_EB > 0), down_EB)
        return gate_up + down + 2 * len(self.widths) * index_bits(self.hidden)

    def segments(self, lines_EB: torch.Tensor, length_EB: torch.Tensor) -> int:
        """Bits of segments of so many lines of so many codes at 0, 1, ... 8 bits."""
        bits_B = torch.arange(lines_EB.shape[1])
        beside_B = torch.tensor([metadata_bits(b, self.sym) for b in bits_B.tolist()])
        step = self.group_size or max(int(length_EB.max()), 1)
        groups_EB = (length_EB + step - 1) // step
        codes_EB = (lines_EB * length_EB * bits_B + 7) // 8 * 8  # whole bytes
        return int((codes_EB + lines_EB * groups_EB * beside_B).sum())

    def average(self, bits_N: torch.Tensor) -> float:
        """Stored bits per weight of a plan; removed weights count in the denominator."""
        return self.stored(bits_N) / max(self.weights, 1)

    def uniform(self, bits: int) -> float:
        """Stored bits per weight if all micro-experts have the same."""
        counts_EB = torch.zeros(len(self.widths), MOST_BITS + 1, dtype=torch.int64)
        counts_EB[:, bits] = torch.tensor(self.widths)
        return self._stored(counts_EB) / max(self.weights, 1)


def ranking(score_N: torch.Tensor, widths: Sequence[int], scope: str) -> torch.Tensor:
    """The order in which micro-experts get bits, best first; of equals the first goes first.

    layer (and model, for a pool of several layers): by score over the whole pool. expert: by rank
    within its expert, (rank + 1/2) / width, so that any prefix takes the same share of each.
    """
    if scope != "expert":
        return torch.argsort(score_N, descending=True, stable=True)
    place_N = torch.empty(len(score_N), dtype=torch.float64)
    for rows in torch.arange(len(score_N)).split(list(widths)):
        order = torch.argsort(score_N[rows], descending=True, stable=True)
        place_N[rows[order]] = (torch.arange(len(rows)) + 0.5).double() / max(len(rows), 1)
    return torch.argsort(place_N, stable=True)


def assign(
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


def cuts_of(ratios: Sequence[float], micro_experts: int) -> list[int]:
    """Where the groups of these shares end in a ranking, those below rounded down as Camera-P's."""
    below = accumulate(reversed(ratios[1:]))
    return [micro_experts - floor(share * micro_experts + 1e-9) for share in below][::-1]


def share_path(
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


def solve_cuts(
    corners: Sequence[tuple[int, ...]], stored: Callable[[tuple[int, ...]], float], budget: float
) -> tuple[int, ...]:
    """The furthest point of a way whose plan takes at most `budget` bits, by bisection.

    Every step along the way moves one micro-expert up. CameraError if its beginning is too much.
    """
    lengths = [
        max((b - a for a, b in zip(p, q, strict=True)), default=0) for p, q in _pairs(corners)
    ]
    low, high = 0, sum(lengths)
    if stored(_at(corners, lengths, 0)) > budget:
        raise CameraError("a plan's lowest bits already take more than the target `bits`.")
    while low < high:
        middle = (low + high + 1) // 2
        if stored(_at(corners, lengths, middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return _at(corners, lengths, low)


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
    footprint: Footprint,
    levels: Sequence[int],
    bits: float,
    *,
    low_share: float,
    align: int = 1,
    stored: Stored | None = None,
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The plan of groups whose stored average comes closest to `bits` from below, and its cuts.

    `low_share` of the micro-experts get the lowest bits; the share of the highest is solved, and
    where no share of it does, the others give way (`share_path`).
    """
    at = _stored_at(order_N, footprint, levels, align, stored)
    corners = share_path(levels, len(order_N), low_share)
    cuts = solve_cuts(corners, at, _budget(footprint, bits))
    return assign(order_N, footprint.widths, levels, cuts, align), cuts


def solve_optimal(
    score_N: torch.Tensor,
    order_N: torch.Tensor,
    footprint: Footprint,
    errors: dict[int, float],
    bits: float,
    *,
    align: int = 1,
    stored: Stored | None = None,
) -> torch.Tensor:
    """The plan of least predicted error sum_i score_i * errors[b_i] within the byte budget.

    errors: what share of a micro-expert's energy is lost at a number of bits (0 bits: 1.0). For a
    multiplier lambda each micro-expert takes the b that makes score_i * errors[b] +
    lambda * cost(b) smallest; lambda is solved so that the exact stored bits stay within budget.
    """
    levels = sorted(errors, reverse=True)
    error_B = torch.tensor([errors[b] for b in levels], dtype=torch.float64)
    whole = replace(footprint, widths=(1 << 20,))
    cost_B = torch.tensor([whole.uniform(b) for b in levels], dtype=torch.float64)
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
        return assign(order_N, footprint.widths, levels, cuts(loose), align)
    while at(cuts(tight)) > budget and tight < 1e300:
        tight *= 4
    for _ in range(100):
        middle = (loose * tight) ** 0.5 if loose else tight * 1e-3
        loose, tight = (loose, middle) if at(cuts(middle)) <= budget else (middle, tight)
        if loose and tight <= loose * (1 + 1e-12):
            break
    # micro-experts of equal score change together: go as far between both plans as fits
    found = solve_cuts([cuts(tight), cuts(loose)], at, budget)
    return assign(order_N, footprint.widths, levels, found, align)


def solve_group_size(
    stored: Callable[[int], float], weights: int, bits: float, columns: int
) -> int | None:
    """The smallest group size, a multiple of 8 up to a whole row, that keeps within `bits`."""
    for size in range(GROUP_STEP, columns + GROUP_STEP, GROUP_STEP):
        if stored(size) <= bits * weights * (1 + 1e-9):
            return size
    return None


def _budget(footprint: Footprint, bits: float) -> float:
    return bits * footprint.weights * (1 + 1e-9)


def _stored_at(
    order_N: torch.Tensor,
    footprint: Footprint,
    levels: Sequence[int],
    align: int,
    stored: Stored | None,
) -> Callable[[tuple[int, ...]], float]:
    def at(cuts: tuple[int, ...]) -> float:
        bits_N = assign(order_N, footprint.widths, levels, cuts, align)
        return footprint.stored(bits_N) if stored is None else stored(bits_N, cuts)

    return at
