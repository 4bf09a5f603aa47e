"""Energy of a micro-expert that the expert's other micro-experts can't reproduce.

Shapes: N micro-experts of a layer's pool, W width of one expert, F = sum of W^2 over the experts
(their Gram matrices, one after the other).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import torch

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.scores.base import Score
from camera.calibration.scores.energy import EnergyObserver, EnergyStatistics
from camera.moe.feed_forward import FeedForward
from camera.moe.observer import ExpertCall
from camera.moe.pool import LayerShape

RIDGE = 0.1  # of the mean energy: experts with fewer tokens than micro-experts are singular


@dataclass
class ResidualStatistics(EnergyStatistics):
    """Energies of a layer's pool and the residual score of each micro-expert, fp64."""

    kind: ClassVar[str] = "residual"
    residual_N: torch.Tensor


@dataclass
class GramStatistics(EnergyStatistics):
    """Energies of a layer's pool, and gram_F = phi^T phi of each expert in turn, fp32."""

    kind: ClassVar[str] = "grams"
    reduced: ClassVar[dict[str, str]] = EnergyStatistics.reduced | {"gram_F": "sum"}
    gram_F: torch.Tensor

    @cached_property
    def residual_N(self) -> torch.Tensor:
        """s_i = |phi_i - best combination of the expert's other phi|^2 * |w_i^down|^2, fp64 [N].

        What is lost of the output when i goes and the others are refitted (optimal brain surgeon);
        0 for experts without a token. The matrices of a layer's experts are inverted one by one.
        """
        squares = [width**2 for width in self.widths]
        parts = zip(
            self.gram_F.split(squares), self.basis_N.split(self.widths), self.widths, strict=True
        )
        shares = [unexplained(gram.view(w, w), basis) for gram, basis, w in parts]
        return self.energy(0.0) * torch.cat(shares)

    def stored(self) -> ResidualStatistics:
        """The scores instead of the matrices, which are as large as the layer."""
        energy = {f.name: getattr(self, f.name) for f in fields(EnergyStatistics)}
        return ResidualStatistics(**energy, residual_N=self.residual_N)


class GramObserver(LayerObserver):
    """Gathers a layer's energies and Gram matrices."""

    def __init__(self, ffn: FeedForward):
        self._energy = EnergyObserver(ffn)
        device = next(ffn.module.parameters()).device
        self._gram_F = torch.zeros(sum(width**2 for width in ffn.widths), device=device)
        parts = iter(self._gram_F.split([width**2 for width in ffn.widths]))
        self._gram_WW = {
            (group.path, expert): next(parts).view(width, width)
            for group in ffn.groups
            for expert, width in enumerate(group.widths)
        }

    def __call__(self, call: ExpertCall) -> None:
        self._energy(call)
        h_NW = call.h_NW.float()
        phi_NW = h_NW if call.a_N is None else h_NW * call.a_N[:, None]
        self._gram_WW[call.group.path, call.expert].addmm_(phi_NW.T, phi_NW)

    def result(self) -> GramStatistics:
        """The statistics gathered so far, on the CPU."""
        energy = self._energy.result()
        gram_F = self._gram_F.cpu()
        return GramStatistics(groups=energy.groups, **energy.tensors(), gram_F=gram_F)


@dataclass(frozen=True)
class GramSpec(ObserverSpec):
    """Gram matrices of every expert's phi."""

    statistics: ClassVar[type[GramStatistics]] = GramStatistics

    def nbytes(self, layer: LayerShape) -> int:
        """4 sum(W^2), and one of the matrices solved in fp64."""
        widths = layer.pool.widths
        return 4 * sum(w * w for w in widths) + 24 * max(widths) ** 2

    def build(self, index: int, ffn: FeedForward) -> GramObserver:
        return GramObserver(ffn)


@dataclass(frozen=True)
class ResidualScore(Score):
    """Energy unexplained by the expert's other micro-experts."""

    name: ClassVar[str] = "residual"

    def observer(self) -> ObserverSpec:
        return GramSpec()

    def values(self, seen: GramStatistics | ResidualStatistics) -> torch.Tensor:
        return seen.residual_N


def unexplained(gram_WW: torch.Tensor, basis_W: torch.Tensor) -> torch.Tensor:
    """Share of |phi_i|^2 that no combination of the expert's other phi explains, fp64 [W].

    (1 / [(C + ridge)^-1]_ii - ridge) / C_ii with C_ij = |w_i| |w_j| phi_i . phi_j, the ridge a
    share of C's mean diagonal: as in `camera.compensation.least_squares`, what changes weights
    much counts as little as it explains. 0 for a micro-expert that does nothing. `basis_W` is
    |w_i^down|^2.
    """
    scale_W = basis_W.double().sqrt()
    scaled_WW = gram_WW.double() * scale_W * scale_W[:, None]
    energy_W = scaled_WW.diagonal().clone()
    if not energy_W.any():
        return torch.zeros(len(energy_W), dtype=torch.float64)
    ridge = RIDGE * energy_W.mean()
    scaled_WW.diagonal().add_(ridge)
    inverse_WW = torch.cholesky_inverse(torch.linalg.cholesky(scaled_WW))
    # of a micro-expert that does nothing the ridge alone is left
    left_W = (1 / inverse_WW.diagonal() - ridge).clamp(min=0)
    return torch.where(energy_W > 0, left_W / energy_W, 0.0).clamp(max=1)
