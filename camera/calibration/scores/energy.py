"""Micro-expert energy: statistics over calibration tokens, and the formula.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts 0, 1, ...;
within an expert by row), W width of one expert, E experts of the pool, T tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.calibration.statistics import LayerStatistics
from camera.moe.feed_forward import ExpertGroup, FeedForward


@dataclass
class LayerEnergy(LayerStatistics):
    """What calibration knows of one layer's pool; any alpha is served without another pass.

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


class EnergyObserver:
    """Gathers a layer's energies from any number of `camera.moe.capture.observe` passes."""

    def __init__(self, ffn: FeedForward):
        self._groups = {group.path: group for group in ffn.groups}
        self._start: dict[tuple[str, int], int] = {}
        self._expert: dict[tuple[str, int], int] = {}
        rows = 0
        for group in ffn.groups:
            for expert, width in enumerate(group.widths):
                self._expert[group.path, expert] = len(self._start)
                self._start[group.path, expert] = rows
                rows += width
        device = next(ffn.module.parameters()).device
        double = torch.float32 if device.type == "mps" else torch.float64
        self._sum2_N = torch.zeros(rows, dtype=double, device=device)
        self._max2_N = torch.zeros(rows, dtype=torch.float32, device=device)
        self._tokens = [0] * len(self._start)

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        x_NH: torch.Tensor,
        h_NW: torch.Tensor,
        a_N: torch.Tensor | None,
    ) -> None:
        phi_NW = h_NW if a_N is None else h_NW * a_N[:, None]
        phi2_NW = phi_NW.float().square()
        start = self._start[group.path, expert]
        rows = slice(start, start + h_NW.shape[1])
        self._sum2_N[rows] += phi2_NW.sum(0)
        self._max2_N[rows] = torch.maximum(self._max2_N[rows], phi2_NW.amax(0))
        self._tokens[self._expert[group.path, expert]] += len(h_NW)

    def result(self) -> LayerEnergy:
        """The statistics gathered so far, on the CPU."""
        basis = [basis_norm(group) for group in self._groups.values()]
        return LayerEnergy(
            groups={path: list(group.widths) for path, group in self._groups.items()},
            sum2_N=self._sum2_N.cpu().double(),
            max2_N=self._max2_N.cpu(),
            basis_N=torch.cat(basis).cpu(),
            tokens_E=torch.tensor(self._tokens, dtype=torch.int64),
        )


def basis_norm(group: ExpertGroup) -> torch.Tensor:
    """|w_down|^2 of every micro-expert of a group, fp32, in pool order."""
    experts = range(len(group.widths))
    return torch.cat([group.down(e).detach().float().square().sum(0) for e in experts])
