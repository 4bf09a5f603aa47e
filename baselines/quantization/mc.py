"""Mixture Compressor: whole experts get 1, 2 or 3 bits by an integer program, then GPTQ.

Shapes: E routed experts, B bit widths (1, 2, 3), N tokens of one expert, H hidden, W width.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F

from baselines.quantization.mc_allocation import Allocations, expert_costs, reachable
from camera.calibration.hessians import HessianObserver, LayerHessians
from camera.checkpoint.formats.packed.footprint import Footprint
from camera.moe.budget import Budget
from camera.moe.feed_forward import ExpertGroup, FeedForward
from camera.moe.pool import LayerPool
from camera.quantization.base import GROUP_SIZE, Quantization, footprints, hidden_size
from camera.quantization.bit_plan import ExpertBits
from camera.quantization.gptq import GPTQ
from camera.runtime.errors import CameraError

LEVELS = (1, 2, 3)


@dataclass
class LayerFactors(LayerHessians):
    """Hessians of a layer, and what the integer program weighs of its routed experts.

    count_E tokens routed to each, weight_E sum of their routing weights as the layer applies them;
    loss2_EB = |a (E(x) - E_b(x))|_F^2 over all tokens, E_b the expert rounded to b bits;
    loss_EB the same norms, not squared, summed over calibration batches (the reference's).
    """

    kind: ClassVar[str] = "mc"
    reduced: ClassVar[dict[str, str]] = LayerHessians.reduced | {
        "count_E": "sum",
        "weight_E": "sum",
        "loss2_EB": "sum",
        "loss_EB": "sum",
    }
    count_E: torch.Tensor
    weight_E: torch.Tensor
    loss2_EB: torch.Tensor
    loss_EB: torch.Tensor


class FactorObserver:
    """Gathers `LayerFactors`: only the tokens routed to an expert tell what rounding it costs."""

    def __init__(self, ffn: FeedForward, solver: GPTQ, hessians: HessianObserver):
        self._hessians = hessians
        routed = next(group for group in ffn.groups if group.routed)
        experts = len(routed.widths)
        self._rounded = [_rounded(routed, expert, solver) for expert in range(experts)]
        self._count_E = torch.zeros(experts, dtype=torch.int64)
        self._weight_E = torch.zeros(experts, dtype=torch.float64)
        self._loss2_EB = torch.zeros(experts, len(LEVELS), dtype=torch.float64)
        self._loss_EB = torch.zeros(experts, len(LEVELS), dtype=torch.float64)

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        x_NH: torch.Tensor,
        h_NW: torch.Tensor,
        a_N: torch.Tensor | None,
    ) -> None:
        self._hessians(group, expert, x_NH, h_NW, a_N)
        if not group.routed:
            return
        self._count_E[expert] += len(x_NH)
        self._weight_E[expert] += float(a_N.double().sum())
        x_NH, h_NW = x_NH.float(), h_NW.float()
        y_NH = F.linear(h_NW, group.down(expert).float())
        for place, (gate_up, down) in enumerate(self._rounded[expert]):
            gate_NW, up_NW = F.linear(x_NH, gate_up.float()).chunk(2, 1)
            rounded_NH = F.linear(group.act_fn(gate_NW) * up_NW, down.float())
            loss2 = float(((y_NH - rounded_NH) * a_N[:, None]).double().square().sum())
            self._loss2_EB[expert, place] += loss2
            self._loss_EB[expert, place] += loss2**0.5

    def result(self) -> LayerFactors:
        """The statistics gathered so far."""
        seen = self._hessians.result()
        return LayerFactors(
            **{f.name: getattr(seen, f.name) for f in fields(LayerHessians)},
            count_E=self._count_E,
            weight_E=self._weight_E,
            loss2_EB=self._loss2_EB,
            loss_EB=self._loss_EB,
        )


def _rounded(
    group: ExpertGroup, expert: int, solver: GPTQ
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gate and up (stacked), and down, rounded to each of LEVELS, in the weights' own precision.

    All levels are solved at once, one below the other.
    """
    weights, rounded = (torch.cat(group.gate_up(expert)), group.down(expert)), []
    for w_RC in weights:
        rows, levels = len(w_RC), len(LEVELS)
        row_bits = torch.repeat_interleave(torch.tensor(LEVELS), rows)
        solved = solver.solve(w_RC.detach().repeat(levels, 1)[None], row_bits=row_bits)
        rounded.append(solved.weight[0].to(w_RC.dtype).split(rows))
    return list(zip(*rounded, strict=True))


@dataclass
class MixtureCompressor(Quantization):
    """MC (its pre-loading part, PMQ): per layer, sum_e b_e bits are dealt out to the experts.

    Minimises sum_e n_e^alpha w_e^beta eps_{e,b}^loss_exponent exactly, with at least one expert of
    3 and one of 2 bits; the layer's budget is the largest that keeps the stored average (shared
    experts included, at `shared_bits`) within `bits`. loss_norm batches sums one norm per
    calibration batch, as the released code; all takes one norm over all tokens, which no batch size
    changes.
    `expert_alpha` and `expert_beta` are the paper's alpha and beta; its loss_exponent is 2, the
    released code's 1. Routing weights are those the model applies; the released code sums them
    before they are renormalised.
    Source: Mixture Compressor (ICLR 2025).
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
        if not any(any(pool.routed) for pool in budget.layers.values()):
            raise CameraError(
                f"method mc deals bits out to experts, and this {budget.model_type} model has "
                "none: use method=gptq."
            )
        if self.bits is None:
            raise CameraError("method mc needs a target: set bits.")
        if self.loss_norm not in ("all", "batches"):
            raise CameraError(f"loss_norm={self.loss_norm} is none of all, batches.")
        if not 1 <= self.shared_bits <= 8:
            raise CameraError(f"shared_bits={self.shared_bits} must lie between 1 and 8.")
        if not set(self.at_least_one) <= set(LEVELS):
            raise CameraError(f"at_least_one={self.at_least_one} must be among {LEVELS}.")
        super().check(budget)

    def reachable(self, budget: Budget) -> tuple[float, float]:
        pools = footprints(budget, self._size(), self.sym, self.scattered)
        ends = []
        for most in (False, True):
            stored = 0
            for index, pool in pools.items():
                routed = budget.layers[index].routed
                forced = self.at_least_one[: sum(routed)]
                rest = [max(LEVELS) if most else min(LEVELS)] * (sum(routed) - len(forced))
                stored += pool.stored(self._bits(pool, routed, [*forced, *rest]))
            ends.append(stored / max(sum(pool.weights for pool in pools.values()), 1))
        return tuple(ends)

    def solver(self, group_size: int | None) -> GPTQ:
        return replace(super().solver(group_size), inblock_feedback=self.inblock_feedback)

    def observer(self, index: int, ffn: FeedForward) -> Any:
        nearest = replace(self.solver(self._size()), act_order=False)
        return FactorObserver(ffn, nearest, super().observer(index, ffn))

    def plan(
        self, index: int, ffn: FeedForward, seen: LayerFactors, budget: Budget
    ) -> tuple[list[ExpertBits], int | None]:
        layer: LayerPool = budget.layers[index]
        shape = hidden_size(ffn), tuple(ffn.widths)
        pool = Footprint(*shape, self._size(), self.sym, self.scattered)
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
            if pool.stored(bits_N) <= self.bits * pool.weights * (1 + 1e-9):
                return [ExpertBits.matched(part) for part in bits_N.split(ffn.widths)], self._size()
        raise CameraError(
            f"bits={self.bits} can't be met in layer {index}: the least is "
            f"{pool.average(bits_N):.4g} bits per weight; lower shared_bits or raise bits."
        )

    def _size(self) -> int | None:
        if self.group_size is None:
            return GROUP_SIZE
        return None if self.group_size == -1 else self.group_size

    def _bits(self, pool: Footprint, routed: list[bool], bits_E: list[int]) -> torch.Tensor:
        """Bits by micro-expert: those of the routed experts, the shared ones at their own."""
        dealt = iter(bits_E)
        experts = torch.tensor([next(dealt) if r else self.shared_bits for r in routed])
        return torch.repeat_interleave(experts, torch.tensor(pool.widths))
