"""Magnitude: micro-experts of small weights go; no text is read.

Shapes: N micro-experts of a layer's pool, W width of one expert, H hidden.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from camera.calibration.statistics import LayerStatistics
from camera.moe.budget import Budget
from camera.moe.feed_forward import FeedForward
from camera.pruning.micro_experts import MicroExpertPruning
from camera.runtime.errors import CameraError


@dataclass
class LayerWeights(LayerStatistics):
    """|w_gate|^2, |w_up|^2 and |w_down|^2 of every micro-expert of a layer's pool, fp32."""

    kind: ClassVar[str] = "weights"
    gate2_N: torch.Tensor
    up2_N: torch.Tensor
    down2_N: torch.Tensor


class WeightObserver:
    """Sees a layer's weights and nothing else."""

    def __init__(self, ffn: FeedForward):
        self._ffn = ffn

    @torch.no_grad()
    def result(self) -> LayerWeights:
        """The squared norms of the layer's micro-experts, on the CPU."""
        parts: list[tuple[torch.Tensor, ...]] = []
        for group in self._ffn.groups:
            for expert in range(len(group.widths)):
                gate_WH, up_WH = group.gate_up(expert)
                rows = (gate_WH, up_WH, group.down(expert).T)
                parts.append(tuple(w.float().square().sum(1).cpu() for w in rows))
        gate2_N, up2_N, down2_N = (torch.cat(column) for column in zip(*parts, strict=True))
        groups = {group.path: list(group.widths) for group in self._ffn.groups}
        return LayerWeights(groups=groups, gate2_N=gate2_N, up2_N=up2_N, down2_N=down2_N)


@dataclass
class Magnitude(MicroExpertPruning):
    """The micro-experts of smallest weights go, without calibration.

    `score` weight_product ranks by |w_gate| |w_up| |w_down|, which scaling up_i by c and down_i by
    1/c (the same function) leaves alone; weight_sum by the norm of all three together.
    """

    name: ClassVar[str] = "magnitude"
    calibrates: ClassVar[bool] = False

    score: Literal["weight_product", "weight_sum"] = "weight_product"

    def check(self, budget: Budget) -> None:
        if self.score not in ("weight_product", "weight_sum"):
            raise CameraError(f"method.score={self.score} is none of weight_product, weight_sum.")
        super().check(budget)

    def statistics_key(self) -> dict[str, Any]:
        return {"kind": "weights"}

    def observer(self, index: int, ffn: FeedForward) -> WeightObserver:
        return WeightObserver(ffn)

    def scores(self, index: int, seen: LayerWeights, micro_experts: int) -> torch.Tensor:
        gate2_N, up2_N, down2_N = seen.gate2_N.double(), seen.up2_N.double(), seen.down2_N.double()
        if self.score == "weight_product":
            return (gate2_N * up2_N * down2_N).sqrt()
        return (gate2_N + up2_N + down2_N).sqrt()
