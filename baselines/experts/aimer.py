"""AIMER: removes the experts whose weights are of the most even magnitude, without calibration.

https://arxiv.org/abs/2603.18492

Shapes: E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from baselines.experts.scored import ScoredExperts
from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.moe.pool import PoolIndex

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from camera.moe.feed_forward import FeedForward


@dataclass(frozen=True)
class Aimer(ScoredExperts):
    """Removes the experts of highest (sum |w| / n) / sqrt(sum w^2 / n), by no text.

    The sums are over the n entries of gate, up and down together, in fp32: 1 for weights of one
    magnitude, 0.80 for Gaussian ones, less where few large weights carry the expert. Scaling an
    expert leaves it alone. Source: AIMER (arXiv 2603.18492).
    """

    name: ClassVar[str] = "aimer"

    @property
    def reads_text(self) -> bool:
        return not self.native  # constants are means over text

    def observer(self) -> MagnitudeSpec:
        return MagnitudeSpec()

    def expert_scores(self, seen: ExpertMagnitudes) -> Tensor:
        return -seen.mean_E / seen.mean2_E.sqrt().clamp(min=1e-30)


@dataclass
class ExpertMagnitudes(LayerStatistics):
    """Means of |w| and w^2 over all weights of each routed expert, fp64 [E]."""

    kind: ClassVar[str] = "expert_magnitudes"
    mean_E: torch.Tensor
    mean2_E: torch.Tensor


class MagnitudeObserver(LayerObserver):
    """Reads the weights of a layer's routed experts alone."""

    def __init__(self, ffn: FeedForward):
        self._ffn = ffn

    def result(self) -> ExpertMagnitudes:
        """The means of every routed expert, on the CPU."""
        import torch

        group, means = self._ffn.routed, []
        for expert in range(len(group.widths)):
            weights = (*group.gate_up(expert), group.down(expert))
            parts = [w.detach().float() for w in weights]
            count = sum(w.numel() for w in parts)
            total = torch.stack([w.abs().sum() for w in parts]).sum()
            squares = torch.stack([w.square().sum() for w in parts]).sum()
            means.append(torch.stack((total, squares)) / count)
        mean_E, mean2_E = torch.stack(means).cpu().double().unbind(1)
        return ExpertMagnitudes(
            PoolIndex(self._ffn).groups, mean_E.contiguous(), mean2_E.contiguous()
        )


@dataclass(frozen=True)
class MagnitudeSpec(ObserverSpec):
    """Means of the magnitudes of experts' weights."""

    statistics: ClassVar[type[ExpertMagnitudes]] = ExpertMagnitudes
    reads: ClassVar[Literal["weights"]] = "weights"

    def build(self, index: int, ffn: FeedForward) -> MagnitudeObserver:
        return MagnitudeObserver(ffn)
