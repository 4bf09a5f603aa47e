"""What of a micro-expert the others of its expert can't stand in for.

Shapes: N micro-experts of a layer's pool, W width of one expert, F = sum of W^2 over the experts
(their Gram matrices, one after the other).
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import torch

from camera.blocks import ExpertGroup, FeedForward
from camera.energy import EnergyObserver, LayerEnergy

RIDGE = 0.01  # of the mean diagonal: experts with fewer tokens than micro-experts are singular


@dataclass
class LayerResidual(LayerEnergy):
    """Energies of a layer's pool and the residual score of each micro-expert, fp64."""

    kind: ClassVar[str] = "residual"
    residual_N: torch.Tensor


@dataclass
class LayerGrams(LayerEnergy):
    """Energies of a layer's pool, and gram_F = phi^T phi of each expert in turn, fp32."""

    kind: ClassVar[str] = "grams"
    reduced: ClassVar[dict[str, str]] = LayerEnergy.reduced | {"gram_F": "sum"}
    gram_F: torch.Tensor

    @cached_property
    def residual_N(self) -> torch.Tensor:
        """s_i = |w_i^down|^2 / [(G + ridge)^-1]_ii, fp64 [N]; 0 for experts without a token.

        1 / [G^-1]_ii is the squared norm of what of phi_i is no combination of the expert's other
        phi: what is lost of the output when i goes and the others are refitted (optimal brain
        surgeon). The matrices of a layer's experts are inverted one by one.
        """
        squares = [width**2 for width in self.widths]
        parts = zip(self.gram_F.split(squares), self.widths, strict=True)
        lost = [_unexplained(gram.view(width, width)) for gram, width in parts]
        return torch.cat(lost) * self.basis_N.double()

    def stored(self) -> LayerResidual:
        """The scores instead of the matrices, which are as large as the layer."""
        energy = {f.name: getattr(self, f.name) for f in fields(LayerEnergy)}
        return LayerResidual(**energy, residual_N=self.residual_N)


class GramObserver:
    """Gathers a layer's energies and Gram matrices from any number of `observe` passes."""

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

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        x_NH: torch.Tensor,
        h_NW: torch.Tensor,
        a_N: torch.Tensor | None,
    ) -> None:
        self._energy(group, expert, x_NH, h_NW, a_N)
        phi_NW = h_NW.float() if a_N is None else h_NW.float() * a_N[:, None]
        self._gram_WW[group.path, expert].addmm_(phi_NW.T, phi_NW)

    def result(self) -> LayerGrams:
        """The statistics gathered so far, on the CPU."""
        energy = self._energy.result()
        gram_F = self._gram_F.cpu()
        return LayerGrams(groups=energy.groups, **energy.tensors(), gram_F=gram_F)


def _unexplained(gram_WW: torch.Tensor) -> torch.Tensor:
    norm2_W = gram_WW.diagonal().double()
    if not norm2_W.any():
        return torch.zeros_like(norm2_W)
    ridge = RIDGE * norm2_W.mean()
    factor_WW = torch.linalg.cholesky(gram_WW.double() + torch.diag(ridge.expand(len(norm2_W))))
    # of a micro-expert that does nothing the ridge alone is left
    return (1 / torch.cholesky_inverse(factor_WW).diagonal() - ridge).clamp(min=0)
