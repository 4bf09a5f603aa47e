"""Camera-Q, and its ablation Camera-Q-dagger: bits by micro-expert energy, over the one solver.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts), E experts of
the pool, H hidden, W width of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from camera.calibration.hessians import LayerHessians
from camera.calibration.scores.base import Name, Score, Scored
from camera.calibration.scores.energy import LayerEnergy
from camera.calibration.statistics import LayerStatistics
from camera.checkpoint.formats.packed.footprint import MOST_BITS, Footprint
from camera.moe.budget import Budget
from camera.moe.feed_forward import FeedForward
from camera.quantization.base import CLOSE, GROUP_SIZE, Quantization, footprints, hidden_size
from camera.quantization.bit_errors import bit_errors
from camera.quantization.bit_plan import (
    SCOPES,
    ExpertBits,
    assign,
    cuts_of,
    ranking,
    share_path,
    solve_group_size,
    solve_optimal,
    solve_shares,
)
from camera.runtime.errors import CameraError


@dataclass
class CameraQ(Scored, Quantization):
    """Micro-experts of high energy get more bits, the same in gate, up and down.

    The pool, ranked by energy, is cut into groups of `group_bits` (0: removed; null: 3, 2, 1 as in
    the paper, 4, 3, 2 and so on where shares are solved and the target allows more than 2 bits to
    all). Their shares are those that minimise the predicted error sum_i E_i * error(b_i) within the
    target `bits`, by errors measured in each layer; or `low_share` of the pool gets the fewest bits
    and the share of the most is solved; or they are `ratios`, and without a group_size that is
    solved instead. rank_scope: rank within a layer, each expert, or the whole model (by scores of
    the dense model). score: energy, or another one of `camera.calibration.scores.base`, of the dense model. align:
    boundaries in an expert are multiples.

    Source: CAMERA (AAAI 2026), whose shares and group size aren't published.
    """

    name: ClassVar[str] = "camera_q"

    bits: float | None = 2.25
    alpha: float = 0.9
    group_bits: list[int] | None = None
    ratios: list[float] | None = None
    low_share: float | None = None
    rank_scope: Literal["layer", "expert", "global"] = "layer"
    align: int = 1
    score: Name = "energy"
    normalize: Literal["routed", "all"] = "routed"

    def __post_init__(self) -> None:
        self._scores: dict[int, torch.Tensor] | None = None  # of the dense model
        self._plans: dict[int, torch.Tensor] | None = None
        self._middle = 2  # of three groups

    @property
    def one_shot(self) -> bool:
        return self.rank_scope == "global" or self.score != "energy"

    @property
    def ranked_by(self) -> Score:
        return Score(self.score, self.alpha, self.normalize)

    @property
    def levels(self) -> list[int]:
        """Bits of the groups, the most first; those that follow the target are known by `check`."""
        if self.group_bits is not None:
            return list(self.group_bits)
        return [self._middle + 1, self._middle, self._middle - 1]

    def _follow(self, budget: Budget) -> None:
        """Put the groups around the bits that the target allows all; none is removed unasked."""
        if self.bits is None or self.ratios is not None:
            return
        pools = list(footprints(budget, self._group_size(), self.sym).values())
        weights = max(sum(pool.weights for pool in pools), 1)

        def distance(bits: int) -> float:
            stored = sum(pool.uniform(bits) * pool.weights for pool in pools)
            return abs(stored / weights - self.bits)

        self._middle = min(range(2, MOST_BITS), key=distance)

    def check(self, budget: Budget) -> None:
        self._follow(budget)
        levels = self.levels
        if levels != sorted(set(levels) & set(range(9)), reverse=True) or not any(levels):
            raise CameraError(
                f"group_bits={levels} must be different bits from 8 to 0, the most first."
            )
        if self.low_share is not None and not 0 <= self.low_share <= 1:
            raise CameraError(f"low_share={self.low_share} must lie between 0 and 1.")
        if self.rank_scope not in SCOPES:
            raise CameraError(f"rank_scope={self.rank_scope} is none of {', '.join(SCOPES)}.")
        if self.align < 1:
            raise CameraError("align must be at least 1.")
        self._check_shares(levels)
        super().check(budget)
        if self.ratios is not None:
            for pool in footprints(budget, self._group_size(), self.sym).values():
                self.allocate(torch.zeros(pool.micro_experts), pool)  # refuses what isn't met

    def _check_shares(self, levels: Sequence[int]) -> None:
        if self.act_order and not self.static_groups:
            raise CameraError("act_order tears column segments apart: set static_groups=true too.")
        if self.ratios is None:
            if self.bits is None and len(levels) > 1:
                raise CameraError("bits=null leaves the shares open: set ratios.")
            if self.low_share is not None:
                share_path(levels, 0, self.low_share)  # refuses more groups than can be solved
            elif self.rank_scope == "global" and len(levels) > 1:
                raise CameraError(
                    "errors are measured layer by layer: with rank_scope=global set low_share or "
                    "ratios."
                )
        elif len(self.ratios) != len(levels) or min(self.ratios) < 0:
            raise CameraError(
                f"ratios={list(self.ratios)} must be a share for each of group_bits={levels}."
            )
        elif abs(sum(self.ratios) - 1) > 1e-6:
            raise CameraError(f"ratios={list(self.ratios)} must add up to 1.")

    def reachable(self, budget: Budget) -> tuple[float, float]:
        if self.ratios is not None:
            return 0.0, float("inf")  # the group size decides
        pools = list(footprints(budget, self._group_size(), self.sym).values())
        weights = sum(pool.weights for pool in pools)
        ends = []
        levels = self.levels
        for bits in (min(levels), max(levels)):
            stored = 0.0
            for pool in pools:
                size, steps = pool.micro_experts, len(levels) - 1
                cuts = [size if bits == levels[0] else 0] * steps
                stored += self.stored(pool, torch.full((size,), bits), cuts)
            ends.append(stored / max(weights, 1))
        return tuple(ends)

    def observer(self, index: int, ffn: FeedForward) -> Any:
        if self.one_shot and self._scores is None:
            return super().observer(index, ffn)
        return Quantization.observer(self, index, ffn)

    def prepare(self, statistics: dict[int, LayerStatistics], budget: Budget) -> None:
        self._scores = {index: self.ranked_by.of(seen) for index, seen in statistics.items()}
        if self.rank_scope != "global":
            return
        pools = footprints(budget, self._group_size(), self.sym)
        widths = [width for pool in pools.values() for width in pool.widths]
        hidden = next(iter(pools.values())).hidden
        whole = Footprint(hidden, tuple(widths), self._group_size(), self.sym)
        scores_N = torch.cat([self._scores[index] for index in pools])
        bits_N, _, self._model_group_size = self.allocate(scores_N, whole)
        sizes = [pool.micro_experts for pool in pools.values()]
        self._plans = dict(zip(pools, bits_N.split(sizes), strict=True))

    def plan(
        self, index: int, ffn: FeedForward, seen: LayerEnergy, budget: Budget
    ) -> tuple[list[ExpertBits], int | None]:
        energy_N, widths = self._importance(index, seen), ffn.widths
        if self._plans is not None:
            bits_N, group_size = self._plans[index], self._model_group_size
        else:
            pool = Footprint(hidden_size(ffn), tuple(widths), self._group_size(), self.sym)
            errors = self._errors(ffn, seen, pool)
            bits_N, _, group_size = self.allocate(energy_N, pool, errors)
        parts = zip(bits_N.split(widths), energy_N.split(widths), strict=True)
        return [ExpertBits.matched(bits_W, energy_W) for bits_W, energy_W in parts], group_size

    def _errors(
        self, ffn: FeedForward, seen: LayerHessians, pool: Footprint
    ) -> dict[int, float] | None:
        """What is lost at each number of bits, where shares are solved by it."""
        if self.ratios is not None or self.low_share is not None or len(self.levels) == 1:
            return None
        return bit_errors(ffn, seen, self.solver(pool.group_size), self.levels)

    def _importance(self, index: int, seen: LayerEnergy) -> torch.Tensor:
        return self.ranked_by.of(seen) if self._scores is None else self._scores[index]

    def allocate(
        self, energy_N: torch.Tensor, pool: Footprint, errors: dict[int, float] | None = None
    ) -> tuple[torch.Tensor, tuple[int, ...], int | None]:
        """Bits of every micro-expert of a pool, where the ranking is cut (shares), group size."""
        order_N = ranking(energy_N, pool.widths, self.rank_scope)
        levels, align = self.levels, self.align
        stored = partial(self.stored, pool)
        if self.ratios is not None:
            cuts = cuts_of(self.ratios, len(order_N))
            bits_N = assign(order_N, pool.widths, levels, cuts, align)
            return bits_N, cuts, self._solved_group_size(bits_N, cuts, pool)
        if self.bits is None:  # one group
            return torch.full_like(order_N, levels[0]), (), pool.group_size
        if errors is not None:
            args = (energy_N, order_N, pool, errors, self.bits)
            return *solve_optimal(*args, align=align, stored=stored), pool.group_size
        bits_N, cuts = solve_shares(
            order_N, pool, levels, self.bits, low_share=self.low_share, align=align, stored=stored
        )
        return bits_N, cuts, pool.group_size

    def stored(self, pool: Footprint, bits_N: torch.Tensor, cuts: Sequence[int]) -> float:
        """Bits on disk of a plan."""
        return pool.stored(bits_N)

    def _group_size(self) -> int | None:
        if self.group_size is None:
            return GROUP_SIZE
        return None if self.group_size == -1 else self.group_size

    def _solved_group_size(self, bits_N, cuts, pool: Footprint) -> int | None:
        if self.bits is None:
            return self._group_size()

        def stored(size: int | None) -> float:
            return self.stored(replace(pool, group_size=size), bits_N, cuts)

        if self.group_size is not None:
            average = stored(self._group_size()) / max(pool.weights, 1)
            if abs(average / self.bits - 1) > CLOSE:
                raise CameraError(
                    f"ratios={list(self.ratios)} with group_size={self.group_size} store "
                    f"{average:.4g} bits per weight, not bits={self.bits}: set one of them to null."
                )
            return self._group_size()
        size = solve_group_size(stored, pool.weights, self.bits, max(pool.hidden, *pool.widths))
        if size is None:
            raise CameraError(
                f"bits={self.bits} can't be met with ratios={list(self.ratios)}: one scale per row "
                f"alone stores {stored(None) / pool.weights:.4g} bits per weight."
            )
        return size
