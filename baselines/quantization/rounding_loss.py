"""What rounding a whole expert costs the layer's output, beside its Hessians.

Shapes: E routed experts, B bit widths (1, 2, 3), N tokens of one expert, H hidden, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from camera.calibration.hessians import HessianObserver, HessianSpec, HessianStatistics
from camera.moe.experts.activation import gated
from camera.moe.experts.group import ExpertGroup
from camera.moe.feed_forward import FeedForward
from camera.moe.observer import ExpertCall
from camera.moe.pool import LayerShape
from camera.quantization.quantizers.gptq import GPTQ

LEVELS = (1, 2, 3)


@dataclass
class RoundingLossStatistics(HessianStatistics):
    """Hessians of a layer, and what the integer program weighs of its routed experts.

    count_E tokens routed to each, weight_E sum of their routing weights as the layer applies them;
    loss2_EB = |a (E(x) - E_b(x))|_F^2 over all tokens, E_b the expert rounded to b bits;
    loss_EB the same norms, not squared, summed over calibration batches (the reference's).
    """

    kind: ClassVar[str] = "mc"
    reduced: ClassVar[dict[str, str]] = HessianStatistics.reduced | {
        "count_E": "sum",
        "weight_E": "sum",
        "loss2_EB": "sum",
        "loss_EB": "sum",
    }
    count_E: torch.Tensor
    weight_E: torch.Tensor
    loss2_EB: torch.Tensor
    loss_EB: torch.Tensor


@dataclass(frozen=True)
class RoundingLossSpec(HessianSpec):
    """Hessians and rounding losses; `solver` rounds to nearest."""

    statistics: ClassVar[type[RoundingLossStatistics]] = RoundingLossStatistics

    solver: GPTQ | None = None

    def nbytes(self, layer: LayerShape) -> int:
        """As Hessians, and every routed expert rounded to each of LEVELS."""
        rounded = 3 * layer.hidden * sum(layer.routed_widths) * layer.itemsize
        return super().nbytes(layer) + len(LEVELS) * rounded

    def build(self, index: int, ffn: FeedForward) -> RoundingLossObserver:
        return RoundingLossObserver(ffn, self.solver, super().build(index, ffn))


class RoundingLossObserver(HessianObserver):
    """Gathers `RoundingLossStatistics`: only the tokens routed to an expert tell what rounding it
    costs."""

    def __init__(self, ffn: FeedForward, solver: GPTQ, hessians: HessianObserver):
        self._hessians = hessians
        experts = len(ffn.routed.widths)
        self._rounded = [_rounded(ffn.routed, expert, solver) for expert in range(experts)]
        self._count_E = torch.zeros(experts, dtype=torch.int64)
        self._weight_E = torch.zeros(experts, dtype=torch.float64)
        self._loss2_EB = torch.zeros(experts, len(LEVELS), dtype=torch.float64)
        self._loss_EB = torch.zeros(experts, len(LEVELS), dtype=torch.float64)

    def __call__(self, call: ExpertCall) -> None:
        self._hessians(call)
        group, expert, a_N = call.group, call.expert, call.a_N
        if not group.routed:
            return
        self._count_E[expert] += len(call.x_NH)
        self._weight_E[expert] += float(a_N.double().sum())
        x_NH, h_NW = call.x_NH.float(), call.h_NW.float()
        y_NH = F.linear(h_NW, group.down(expert).float())
        bias_2W = group.gate_up_bias(expert)
        bias_2W = None if bias_2W is None else bias_2W.float()
        for place, (gate_up, down) in enumerate(self._rounded[expert]):
            h_NW = gated(group.act_fn, *F.linear(x_NH, gate_up.float(), bias_2W).chunk(2, 1))
            rounded_NH = F.linear(h_NW, down.float())
            loss2 = float(((y_NH - rounded_NH) * a_N[:, None]).double().square().sum())
            self._loss2_EB[expert, place] += loss2
            self._loss_EB[expert, place] += loss2**0.5

    def result(self) -> RoundingLossStatistics:
        """The statistics gathered so far."""
        hessians = self._hessians.result()
        return RoundingLossStatistics(
            groups=hessians.groups,
            **hessians.tensors(),
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
        # not `split`, which makes one piece of an expert of width 0
        rounded.append(solved.weight[0].to(w_RC.dtype).unflatten(0, (levels, rows)))
    return list(zip(*rounded, strict=True))
