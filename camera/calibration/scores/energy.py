"""Decoding-time energy of micro-experts: the formula, its statistics, its observer, its score.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts 0, 1, ...;
within an expert by row), W width of one expert, E experts of the pool, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.scores.base import Score
from camera.calibration.statistics import LayerStatistics
from camera.moe.experts.group import ExpertGroup
from camera.moe.feed_forward import FeedForward
from camera.moe.grouped.call import GroupCall
from camera.moe.observer import ExpertCall
from camera.moe.pool import PoolIndex, sum_dtype
from camera.runtime.device.staging import on_host
from camera.runtime.errors import CameraError


@dataclass
class EnergyStatistics(LayerStatistics):
    """The parts of the energies of one layer's pool; any alpha is served without another pass.

    sum2_N = sum over tokens of phi^2 (fp64), max2_N = max over tokens of phi^2 (fp32),
    basis_N = |w_down|^2 (fp32), tokens_E = tokens each expert saw (int64).
    """

    kind: ClassVar[str] = "energy"
    reduced: ClassVar[dict[str, str]] = {"sum2_N": "sum", "max2_N": "max", "tokens_E": "sum"}
    sum2_N: torch.Tensor
    max2_N: torch.Tensor
    basis_N: torch.Tensor
    tokens_E: torch.Tensor

    def energy(self, alpha: float) -> torch.Tensor:
        """E_i = [(1 - alpha) * |phi_i|_2^2 + alpha * |phi_i|_inf^2] * |w_i^down|_2^2, fp64 [N].

        Source: CAMERA (AAAI 2026), decoding-time energy; |phi|_2^2 is a sum over tokens.
        """
        phi_N = (1 - alpha) * self.sum2_N + alpha * self.max2_N.double()
        return phi_N * self.basis_N.double()


class EnergyObserver(LayerObserver):
    """Gathers a layer's energies."""

    def __init__(self, ffn: FeedForward):
        self._groups, self._index = list(ffn.groups), PoolIndex(ffn)
        device = next(ffn.module.parameters()).device
        count = self._index.micro_experts
        self._sum2_N = torch.zeros(count, dtype=sum_dtype(device), device=device)
        self._max2_N = torch.zeros(count, dtype=torch.float32, device=device)
        self._tokens = [0] * self._index.experts

    def __call__(self, call: ExpertCall) -> None:
        phi2_NW = call.phi_NW.float().square()
        rows = self._index.rows(call.group.path, call.expert)
        sum2_W, max2_W = self._sum2_N[rows], self._max2_N[rows]
        sum2_W += phi2_NW.sum(0)
        torch.maximum(max2_W, phi2_NW.amax(0), out=max2_W)
        self._tokens[self._index.expert(call.group.path, call.expert)] += len(call.h_NW)

    def together(self, call: GroupCall) -> None:
        sum2_EW, max2_EW = call.squares()
        first, last = (self._index.rows(call.group.path, e) for e in (0, len(sum2_EW) - 1))
        rows = slice(first.start, last.stop)
        self._sum2_N[rows] += sum2_EW.flatten()
        torch.maximum(self._max2_N[rows], max2_EW.flatten(), out=self._max2_N[rows])
        for expert, count in enumerate(call.rows.counts):
            self._tokens[self._index.expert(call.group.path, expert)] += count

    def result(self) -> EnergyStatistics:
        """The statistics gathered so far, on the CPU."""
        basis_N = torch.cat([basis_norm(group) for group in self._groups])
        sum2_N, max2_N, basis_N = on_host(self._sum2_N, self._max2_N, basis_N)
        return EnergyStatistics(
            groups=self._index.groups,
            sum2_N=sum2_N.double(),
            max2_N=max2_N,
            basis_N=basis_N,
            tokens_E=torch.tensor(self._tokens, dtype=torch.int64),
        )


def basis_norm(group: ExpertGroup) -> torch.Tensor:
    """|w_down|^2 of every micro-expert of a group, fp32, in pool order."""
    experts = range(len(group.widths))
    return torch.cat([group.down(e).detach().float().square().sum(0) for e in experts])


@dataclass(frozen=True)
class EnergySpec(ObserverSpec):
    """Energies of every alpha."""

    statistics: ClassVar[type[EnergyStatistics]] = EnergyStatistics

    def build(self, index: int, ffn: FeedForward) -> EnergyObserver:
        return EnergyObserver(ffn)


@dataclass(frozen=True)
class EnergyScore(Score):
    """Camera's energy; `alpha` weighs the largest activation against their sum of squares."""

    name: ClassVar[str] = "energy"

    alpha: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise CameraError(f"alpha={self.alpha} must lie between 0 and 1.")

    def observer(self) -> ObserverSpec:
        return EnergySpec()

    def values(self, seen: EnergyStatistics) -> torch.Tensor:
        return seen.energy(self.alpha)
