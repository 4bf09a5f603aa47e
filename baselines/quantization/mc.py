"""Mixture Compressor: whole experts get 1, 2 or 3 bits by an integer program, then GPTQ.

https://arxiv.org/abs/2410.06270

Shapes: E routed experts, B bit widths (1, 2, 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal

from camera.method import Plan
from camera.quantization.base import Quantization, footprints, hidden_size
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from torch import Tensor

    from baselines.quantization.rounding_loss import RoundingLossSpec, RoundingLossStatistics
    from camera.checkpoint.formats.packed.footprint import StoredBits
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.quantization.plans.layer_bits import LayerBits
    from camera.quantization.quantizers.gptq import GPTQ


@dataclass(frozen=True)
class MixtureCompressor(Quantization):
    """MC (its pre-loading part, PMQ): per layer, sum_e b_e bits are assigned to the experts.

    Minimises sum_e n_e^alpha w_e^beta eps_{e,b}^loss_exponent exactly, with at least one expert of
    3 and one of 2 bits; the layer's budget is the largest that keeps the stored average (shared
    experts included, at `shared_bits`) within `bits`. loss_norm batches sums one norm per
    calibration batch, as the released code; all takes one norm over all tokens, which no batch
    size changes.
    `expert_alpha` and `expert_beta` are the paper's alpha and beta; its loss_exponent is 2, the
    released code's 1. Routing weights are those the model applies; the released code sums them
    before they are renormalised.
    Source: Mixture Compressor (ICLR 2025, arXiv 2410.06270).
    """

    name: ClassVar[str] = "mc"

    bits: float | None = 2.25
    expert_alpha: float = 1.0
    expert_beta: float = 1.5
    loss_exponent: float = 1.0
    loss_norm: Literal["all", "batches"] = "all"
    shared_bits: int = 4
    at_least_one: list[int] = field(default_factory=lambda: [3, 2])
    inblock_feedback: bool = True

    def check(self, budget: Budget) -> None:
        from baselines.quantization.rounding_loss import LEVELS

        if not any(any(pool.routed) for pool in budget.layers.values()):
            raise CameraError(
                f"method mc assigns bits to experts, and this {budget.model_type} model has none: "
                "use method=gptq."
            )
        if self.bits is None:
            raise CameraError("method mc needs a target: set bits.")
        if self.quantizer != "gptq":
            raise CameraError(f"method mc is defined with GPTQ: quantizer={self.quantizer} is not.")
        if self.loss_norm not in ("all", "batches"):
            raise CameraError(f"loss_norm={self.loss_norm} is none of all, batches.")
        if not 1 <= self.shared_bits <= 8:
            raise CameraError(f"shared_bits={self.shared_bits} must lie between 1 and 8.")
        if not set(self.at_least_one) <= set(LEVELS):
            raise CameraError(f"at_least_one={self.at_least_one} must be among {LEVELS}.")
        super().check(budget)
        self._say_what_whole_bits_miss(budget)

    def _say_what_whole_bits_miss(self, budget: Budget) -> None:
        """Say, once for all layers of a shape, what a layer stores well below the target.

        A layer's sum of bits decides, whichever experts get them: all are as wide in native layers.
        """
        import torch

        from baselines.quantization.mc_allocation import Allocations, reachable
        from baselines.quantization.rounding_loss import LEVELS

        told = set()
        size = self.resolved_group_size()
        for index, pool in footprints(budget, size, self.sym, self.scattered).items():
            routed = budget.layers[index].routed
            if (shape := (pool, tuple(routed))) in told:
                continue
            told.add(shape)
            least, most = reachable(sum(routed), LEVELS, self.at_least_one)
            # so that the most bits within each sum are best
            cost_EB = -torch.tensor(LEVELS).expand(sum(routed), -1)
            plans = Allocations(cost_EB, LEVELS, most, self.at_least_one)
            averages = [
                pool.average(self._bits(pool, routed, plans.within(total).tolist()))
                for total in range(least, most + 1)
            ]
            within = [average for average in averages if average <= self.bits * (1 + 1e-9)]
            if within and within[-1] < self.bits * (1 - self.tolerance):
                beyond = min((a for a in averages if a > self.bits), default=inf)
                self.say_missed(f"layer {index} and those like it", within[-1], beyond)

    def reachable(self, budget: Budget) -> tuple[float, float]:
        from baselines.quantization.rounding_loss import LEVELS

        pools = footprints(budget, self.resolved_group_size(), self.sym, self.scattered)
        ends = []
        for most in (False, True):
            stored = 0
            for index, pool in pools.items():
                routed = budget.layers[index].routed
                forced = self.at_least_one[: sum(routed)]
                rest = [max(LEVELS) if most else min(LEVELS)] * (sum(routed) - len(forced))
                stored += pool.total(self._bits(pool, routed, [*forced, *rest]))
            ends.append(stored / max(sum(pool.weights for pool in pools.values()), 1))
        return tuple(ends)

    def quantizer_of(self, group_size: int | None) -> GPTQ:
        return replace(super().quantizer_of(group_size), inblock_feedback=self.inblock_feedback)

    def observer(self) -> RoundingLossSpec:
        from baselines.quantization.rounding_loss import RoundingLossSpec

        hessians = super().observer()
        nearest = replace(self.quantizer_of(self.resolved_group_size()), act_order=False)
        return RoundingLossSpec(hessians.weighted, hessians.keep, nearest)

    def plan_layer(
        self, index: int, ffn: FeedForward, seen: RoundingLossStatistics, budget: Budget, plan: Plan
    ) -> LayerBits:
        from baselines.quantization.mc_allocation import Allocations, expert_costs, reachable
        from baselines.quantization.rounding_loss import LEVELS
        from camera.checkpoint.formats.packed.footprint import StoredBits
        from camera.quantization.plans.layer_bits import ExpertBits, LayerBits

        layer, size = budget.layers[index], self.resolved_group_size()
        shape = hidden_size(ffn), tuple(ffn.widths)
        pool = StoredBits(*shape, size, self.sym, self.scattered)
        cost_EB = expert_costs(
            seen.count_E,
            seen.weight_E,
            seen.loss2_EB.sqrt() if self.loss_norm == "all" else seen.loss_EB,
            alpha=self.expert_alpha,
            beta=self.expert_beta,
            loss_exponent=self.loss_exponent,
        )
        least, most = reachable(len(cost_EB), LEVELS, self.at_least_one)
        allocations = Allocations(cost_EB, LEVELS, most, self.at_least_one)
        for total in range(most, least - 1, -1):
            bits_N = self._bits(pool, layer.routed, allocations.within(total).tolist())
            if pool.total(bits_N) <= self.bits * pool.weights * (1 + 1e-9):
                experts = [ExpertBits.matched(part) for part in bits_N.split(ffn.widths)]
                return LayerBits(experts, size)
        raise CameraError(
            f"bits={self.bits} can't be met in layer {index}: the least is "
            f"{pool.average(bits_N):.4g} bits per weight; lower shared_bits or raise bits."
        )

    def _bits(self, pool: StoredBits, routed: list[bool], bits_E: list[int]) -> Tensor:
        """Bits by micro-expert: those of the routed experts, the shared ones at their own."""
        import torch

        assigned = iter(bits_E)
        experts = torch.tensor([next(assigned) if r else self.shared_bits for r in routed])
        return torch.repeat_interleave(experts, torch.tensor(pool.widths))
