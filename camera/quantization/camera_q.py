"""Camera-Q: bits by micro-expert energy, the same in all three matrices.

https://arxiv.org/abs/2508.02322

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts), E experts of
the pool, H hidden, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from camera.method import Pass, PassKind, Plan, Propagate, Seen
from camera.quantization.base import Quantization, footprints, hidden_size
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from torch import Tensor

    from camera.calibration.hessians import HessianStatistics
    from camera.calibration.scores.base import Score
    from camera.checkpoint.formats.packed.footprint import StoredBits
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.quantization.plans.layer_bits import LayerBits


@dataclass(frozen=True)
class CameraQ(Quantization):
    """Micro-experts of high energy get more bits, the same in gate, up and down.

    The pool, ranked by energy, is divided into groups of `group_bits` (0: pruned; null: 3, 2, 1 as
    in the paper, 4, 3, 2 and so on where shares are solved and the target allows more than 2 bits
    to all). Their shares are those that minimise the predicted error sum_i E_i * error(b_i) within
    the target `bits`, by errors measured in each layer; or `low_share` of the pool gets the fewest
    bits and the share of the most is solved; or they are `ratios`, and without a group_size that is
    solved instead. rank_scope: rank within a layer, each expert, or the whole model (global, by
    scores of the dense model). score: energy, or another name of `camera.calibration.scores`, of
    the dense model. align: boundaries in an expert are multiples.

    Source: CAMERA (AAAI 2026, arXiv 2508.02322), whose shares and group size aren't published.
    """

    name: ClassVar[str] = "camera_q"

    bits: float | None = 2.25
    alpha: float = 0.9
    group_bits: list[int] | None = None
    ratios: list[float] | None = None
    low_share: float | None = None
    rank_scope: Literal["layer", "expert", "global"] = "layer"
    align: int = 1
    score: str = "energy"
    normalize: Literal["routed", "all"] = "routed"

    def ranked_by(self) -> Score:
        """The score that ranks micro-experts."""
        from camera.calibration.scores.base import score_of

        return score_of(self)

    @property
    def of_dense_model(self) -> bool:
        """Whether micro-experts are ranked by the dense model, before the first layer."""
        return self.rank_scope == "global" or self.score != "energy"

    def levels(self, budget: Budget) -> list[int]:
        """Bits of the groups, the most first; unless given, around the bits that the target allows
        all. None is pruned unasked."""
        if self.group_bits is not None:
            return list(self.group_bits)
        if self.bits is None or self.ratios is not None:
            return [3, 2, 1]
        from camera.quantization.plans.shares import levels_around

        return levels_around(self.bits, self._pools(budget))

    def check(self, budget: Budget) -> None:
        from camera.quantization.plans.bit_plan import SCOPES
        from camera.quantization.plans.shares import check_levels, check_shares

        self.ranked_by()  # refuses its own settings
        levels = self.levels(budget)
        check_levels(levels)
        if self.rank_scope not in SCOPES:
            raise CameraError(f"rank_scope={self.rank_scope} is none of {', '.join(SCOPES)}.")
        if self.align < 1:
            raise CameraError("align must be at least 1.")
        if self.act_order and not self.static_groups:
            raise CameraError("act_order tears column segments apart: set static_groups=true too.")
        check_shares(levels, self.ratios, self.low_share, self.bits, self.rank_scope)
        super().check(budget)
        if self.ratios is not None:
            import torch

            for pool in footprints(budget, self.resolved_group_size(), self.sym).values():
                # refuses what isn't met
                self.allocate(torch.zeros(pool.micro_experts), pool, levels)

    def reachable(self, budget: Budget) -> tuple[float, float]:
        import torch

        if self.ratios is not None:
            return 0.0, float("inf")  # the group size decides
        pools, ends, levels = self._pools(budget), [], self.levels(budget)
        weights = sum(pool.weights for pool in pools)
        for bits in (min(levels), max(levels)):
            stored = 0.0
            for pool in pools:
                size, steps = pool.micro_experts, len(levels) - 1
                boundaries = [size if bits == levels[0] else 0] * steps
                stored += self.stored(pool, torch.full((size,), bits), boundaries, levels)
            ends.append(stored / max(weights, 1))
        return tuple(ends)

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        last = super().passes(budget, propagate)
        if not self.of_dense_model:
            return last
        spec = self.ranked_by().observer()
        if spec is None:
            return last
        kinds = {"gradients": PassKind.BACKWARD, "weights": PassKind.WEIGHTS}
        return (Pass(kinds.get(spec.reads, PassKind.DENSE), spec), *last)

    def plan(self, seen: Seen, budget: Budget) -> Plan:
        plan = super().plan(seen, budget)
        levels = self.levels(budget)
        plan = replace(plan, shared={"levels": levels})
        if not self.of_dense_model:
            return plan
        statistics, score = next(iter(seen.values()), {}), self.ranked_by()
        scores = {
            index: score.of_layer(index, statistics.get(index), pool.micro_experts)
            for index, pool in budget.layers.items()
        }
        if self.rank_scope != "global":
            return replace(plan, scores=scores)
        return replace(plan, layers=self._global(scores, budget, levels))

    def _global(
        self, scores: dict[int, Tensor], budget: Budget, levels: Sequence[int]
    ) -> dict[int, LayerBits]:
        import torch

        from camera.checkpoint.formats.packed.footprint import StoredBits

        pools = footprints(budget, self.resolved_group_size(), self.sym)
        widths = [width for pool in pools.values() for width in pool.widths]
        hidden = next(iter(pools.values())).hidden
        whole = StoredBits(hidden, tuple(widths), self.resolved_group_size(), self.sym)
        scores_N = torch.cat([scores[index] for index in pools])
        bits_N, _, group_size = self.allocate(scores_N, whole, levels, where="the model")
        parts = bits_N.split([pool.micro_experts for pool in pools.values()])
        return {
            index: _matched(part_N, scores[index], list(pool.widths), group_size)
            for (index, pool), part_N in zip(pools.items(), parts, strict=True)
        }

    def plan_layer(
        self, index: int, ffn: FeedForward, seen: HessianStatistics, budget: Budget, plan: Plan
    ) -> LayerBits:
        energy_N, pool = self.importance(index, seen, plan), self.pool_of(ffn)
        levels = plan.shared["levels"]
        errors = self.errors(ffn, seen, pool, levels)
        where = f"layer {index}"
        bits_N, _, group_size = self.allocate(energy_N, pool, levels, errors, where=where)
        return _matched(bits_N, energy_N, ffn.widths, group_size)

    def pool_of(self, ffn: FeedForward) -> StoredBits:
        """Stored bits of a layer's pool."""
        from camera.checkpoint.formats.packed.footprint import StoredBits

        shape = hidden_size(ffn), tuple(ffn.widths)
        return StoredBits(*shape, self.resolved_group_size(), self.sym)

    def errors(
        self,
        ffn: FeedForward,
        seen: HessianStatistics,
        pool: StoredBits,
        levels: Sequence[int],
    ) -> dict[int, float] | None:
        """Energy lost at each bit width, where shares are solved by it."""
        from camera.quantization.quantizers.bit_errors import bit_errors

        if self.ratios is not None or self.low_share is not None or len(levels) == 1:
            return None
        return bit_errors(ffn, seen, self.quantizer_of(pool.group_size), levels)

    def importance(self, index: int, seen: HessianStatistics, plan: Plan) -> Tensor:
        """Scores of a layer's micro-experts, fp64 [N]: of the dense model, where the plan has them,
        else of what was seen."""
        if index in plan.scores:
            return plan.scores[index]
        return self.ranked_by().values(seen)

    def allocate(
        self,
        energy_N: Tensor,
        pool: StoredBits,
        levels: Sequence[int],
        errors: dict[int, float] | None = None,
        where: str = "the pool",
    ) -> tuple[Tensor, tuple[int, ...], int | None]:
        """Bits of every micro-expert of a pool, boundaries in the ranking, group size.

        `where` names the pool if it is said that its plan stays well below the target.
        """
        import torch

        from camera.quantization.plans.bit_plan import (
            bits_of_ranking,
            next_stored,
            ranking,
            solve_optimal,
            solve_shares,
        )
        from camera.quantization.plans.shares import boundaries_of

        order_N = ranking(energy_N, pool.widths, self.rank_scope)

        def stored(bits_N: Tensor, boundaries: Sequence[int]) -> float:
            return self.stored(pool, bits_N, boundaries, levels)

        if self.ratios is not None:
            boundaries = boundaries_of(self.ratios, len(order_N))
            bits_N = bits_of_ranking(order_N, pool.widths, levels, boundaries, self.align)
            return bits_N, boundaries, self._solved_group_size(bits_N, boundaries, pool, levels)
        if self.bits is None:  # one group
            return torch.full_like(order_N, levels[0]), (), pool.group_size
        options = {"align": self.align, "stored": stored}
        if errors is not None:
            args = (energy_N, order_N, pool, errors, self.bits)
            bits_N, boundaries = solve_optimal(*args, **options)
        else:
            options["low_share"] = self.low_share
            bits_N, boundaries = solve_shares(order_N, pool, levels, self.bits, **options)
        average = stored(bits_N, boundaries) / max(pool.weights, 1)
        if average < self.bits * (1 - self.tolerance):
            sized = {"align": self.align, "stored": stored}
            following = next_stored(order_N, pool, levels, boundaries, self.bits, **sized)
            self.say_missed(where, average, following)
        return bits_N, boundaries, pool.group_size

    def stored(
        self, pool: StoredBits, bits_N: Tensor, boundaries: Sequence[int], levels: Sequence[int]
    ) -> float:
        """Bits on disk of a plan."""
        return pool.total(bits_N)

    def _pools(self, budget: Budget) -> list[StoredBits]:
        return list(footprints(budget, self.resolved_group_size(), self.sym).values())

    def _solved_group_size(
        self, bits_N: Tensor, boundaries: Sequence[int], pool: StoredBits, levels: Sequence[int]
    ) -> int | None:
        from camera.quantization.plans.bit_plan import solve_group_size

        if self.bits is None:
            return self.resolved_group_size()

        def stored(size: int | None) -> float:
            return self.stored(replace(pool, group_size=size), bits_N, boundaries, levels)

        if self.group_size is not None:
            average = stored(self.resolved_group_size()) / max(pool.weights, 1)
            if abs(average / self.bits - 1) > self.tolerance:
                raise CameraError(
                    f"ratios={list(self.ratios)} with group_size={self.group_size} store "
                    f"{average:.4g} bits per weight, not bits={self.bits}: set one of them to null."
                )
            return self.resolved_group_size()
        size = solve_group_size(stored, pool.weights, self.bits, max(pool.hidden, *pool.widths))
        if size is None:
            raise CameraError(
                f"bits={self.bits} can't be met with ratios={list(self.ratios)}: one scale per row "
                f"alone stores {stored(None) / pool.weights:.4g} bits per weight."
            )
        return size


def _matched(
    bits_N: Tensor, energy_N: Tensor, widths: Sequence[int], group_size: int | None
) -> LayerBits:
    """The same bits in gate, up and down of every micro-expert."""
    from camera.quantization.plans.layer_bits import ExpertBits, LayerBits

    parts = zip(bits_N.split(list(widths)), energy_N.split(list(widths)), strict=True)
    return LayerBits([ExpertBits.matched(*part) for part in parts], group_size)
