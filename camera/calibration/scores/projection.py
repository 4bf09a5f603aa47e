"""What a micro-expert contributes along the output of its own expert.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts 0, 1, ...;
within an expert by row), E experts of the pool; in tensors of one expert N tokens, W its width,
H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.scores.base import Score
from camera.calibration.scores.energy import EnergyObserver, EnergyStatistics
from camera.moe.feed_forward import FeedForward
from camera.moe.observer import ExpertCall
from camera.moe.pool import PoolIndex, sum_dtype


@dataclass
class ProjectionStatistics(EnergyStatistics):
    """A layer's energies, and sums over tokens of h * <w_down, y> / |y| (fp64 [N])."""

    kind: ClassVar[str] = "projection"
    reduced: ClassVar[dict[str, str]] = EnergyStatistics.reduced | {"along_N": "sum"}
    along_N: torch.Tensor

    def projection(self) -> torch.Tensor:
        """s_i = mean over the expert's tokens of h_ti * <w_i, y_t> / |y_t|, fp64 [N].

        y_t = sum_i h_ti * w_i is the expert's output before its routing weight, w_i the output
        weights of micro-expert i. Signed: the sum over an expert's micro-experts is the mean of
        |y_t|. 0 where no token came. Source: TENP (Findings of ACL 2026).
        """
        tokens_N = torch.repeat_interleave(self.tokens_E, torch.tensor(self.widths))
        return self.along_N / tokens_N.clamp(min=1)


class ProjectionObserver(LayerObserver):
    """Gathers projections, and energies with them."""

    def __init__(self, ffn: FeedForward):
        self._energy, self._index = EnergyObserver(ffn), PoolIndex(ffn)
        device = next(ffn.module.parameters()).device
        count = self._index.micro_experts
        self._along_N = torch.zeros(count, dtype=sum_dtype(device), device=device)

    def __call__(self, call: ExpertCall) -> None:
        self._energy(call)
        h_NW, down_HW = call.h_NW.float(), call.group.down(call.expert).detach().float()
        direction_NH = torch.nn.functional.normalize(h_NW @ down_HW.T, dim=1)
        along_NW = h_NW * (direction_NH @ down_HW)
        self._along_N[self._index.rows(call.group.path, call.expert)] += along_NW.sum(0)

    def result(self) -> ProjectionStatistics:
        """The statistics gathered so far, on the CPU."""
        energy = self._energy.result()
        return ProjectionStatistics(
            groups=energy.groups, **energy.tensors(), along_N=self._along_N.cpu().double()
        )


@dataclass(frozen=True)
class ProjectionSpec(ObserverSpec):
    """Projections on the output of each expert."""

    statistics: ClassVar[type[ProjectionStatistics]] = ProjectionStatistics

    def build(self, index: int, ffn: FeedForward) -> ProjectionObserver:
        return ProjectionObserver(ffn)


@dataclass(frozen=True)
class ProjectionScore(Score):
    """TENP's score of a micro-expert: its part of the length of the expert's output."""

    name: ClassVar[str] = "projection"

    def observer(self) -> ObserverSpec:
        return ProjectionSpec()

    def values(self, seen: ProjectionStatistics) -> torch.Tensor:
        return seen.projection()
