"""Magnitude: prunes micro-experts of smallest weight norm; no text is read.

Shapes: N micro-experts of a layer's pool, W width of one expert, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.scores.base import Score, score_of
from camera.calibration.statistics import LayerStatistics
from camera.moe.pool import PoolIndex
from camera.pruning.micro_experts import MicroExpertPruning
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    import torch

    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward


@dataclass
class WeightNormStatistics(LayerStatistics):
    """|w_gate|^2, |w_up|^2 and |w_down|^2 of every micro-expert of a layer's pool, fp32."""

    kind: ClassVar[str] = "weights"
    gate2_N: torch.Tensor
    up2_N: torch.Tensor
    down2_N: torch.Tensor


class WeightObserver(LayerObserver):
    """Reads a layer's weights alone."""

    def __init__(self, ffn: FeedForward):
        self._ffn = ffn

    def result(self) -> WeightNormStatistics:
        """The squared norms of the layer's micro-experts, on the CPU."""
        import torch

        parts: list[tuple[torch.Tensor, ...]] = []
        for group in self._ffn.groups:
            for expert in range(len(group.widths)):
                gate_WH, up_WH = group.gate_up(expert)
                rows = (gate_WH, up_WH, group.down(expert).T)
                parts.append(tuple(w.detach().float().square().sum(1).cpu() for w in rows))
        gate2_N, up2_N, down2_N = (torch.cat(column) for column in zip(*parts, strict=True))
        return WeightNormStatistics(PoolIndex(self._ffn).groups, gate2_N, up2_N, down2_N)


@dataclass(frozen=True)
class WeightSpec(ObserverSpec):
    """Weight norms."""

    statistics: ClassVar[type[WeightNormStatistics]] = WeightNormStatistics
    reads: ClassVar[Literal["weights"]] = "weights"

    def build(self, index: int, ffn: FeedForward) -> WeightObserver:
        return WeightObserver(ffn)


@dataclass(frozen=True)
class WeightProductScore(Score):
    """|w_gate| |w_up| |w_down|, which scaling up_i by c and down_i by 1/c (the same function)
    leaves alone."""

    name: ClassVar[str] = "weight_product"

    def observer(self) -> ObserverSpec:
        return WeightSpec()

    def values(self, seen: WeightNormStatistics) -> torch.Tensor:
        return (seen.gate2_N.double() * seen.up2_N.double() * seen.down2_N.double()).sqrt()


@dataclass(frozen=True)
class WeightSumScore(WeightProductScore):
    """The norm of gate row, up row and down column together."""

    name: ClassVar[str] = "weight_sum"

    def values(self, seen: WeightNormStatistics) -> torch.Tensor:
        return (seen.gate2_N.double() + seen.up2_N.double() + seen.down2_N.double()).sqrt()


@dataclass(frozen=True)
class Magnitude(MicroExpertPruning):
    """Prunes micro-experts of smallest weight norm, without calibration."""

    name: ClassVar[str] = "magnitude"

    score: Literal["weight_product", "weight_sum"] = "weight_product"

    @property
    def reads_text(self) -> bool:
        return self.compensate != "none"

    def check(self, budget: Budget) -> None:
        if self.score not in ("weight_product", "weight_sum"):
            raise CameraError(f"method.score={self.score} is none of weight_product, weight_sum.")
        super().check(budget)

    def ranked_by(self) -> Score:
        return score_of(self)
