"""Energies as shares of the hidden states that they are added to, which compare across layers.

Shapes: T tokens, H hidden.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.calibration.scores.energy import EnergyObserver, LayerEnergy


@dataclass
class LayerShare(LayerEnergy):
    """Energies of phi_ti / |h_t|, h_t the hidden states to which the layer's output is added.

    What comes next normalises hidden states, so this is what the loss feels of a micro-expert, in
    every layer alike. Token by token: a few tokens have states many times as large as all others,
    and would else be all that counts.
    """

    kind: ClassVar[str] = "relative"


class ShareObserver(EnergyObserver):
    """Gathers a layer's energies, each token's as a share of its hidden state."""

    def counts(self, h_TH: torch.Tensor) -> torch.Tensor:
        """1 / |h_t|, [T]."""
        norm_T = torch.linalg.vector_norm(h_TH.float(), dim=1)
        return 1 / norm_T.clamp(min=torch.finfo(torch.float32).tiny)

    def result(self) -> LayerShare:
        """The statistics gathered so far, on the CPU."""
        energy = super().result()
        return LayerShare(groups=energy.groups, **energy.tensors())
