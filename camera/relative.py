"""Energies as shares of the hidden states that they are added to, which compare across layers.

Shapes: T tokens, H hidden, N micro-experts of a layer's pool.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.blocks import FeedForward
from camera.energy import EnergyObserver, LayerEnergy


@dataclass
class LayerShare(LayerEnergy):
    """A layer's energies, and stream2_1 = sum over tokens of |h|^2 (fp64, one number) of the hidden
    states h to which the layer's output is added."""

    kind: ClassVar[str] = "relative"
    reduced: ClassVar[dict[str, str]] = LayerEnergy.reduced | {"stream2_1": "sum"}
    stream2_1: torch.Tensor

    def relative(self, alpha: float) -> torch.Tensor:
        """E_i / sum_t |h_t|^2, fp64 [N]: later layers put out more, to larger hidden states."""
        return self.energy(alpha) / self.stream2_1


class ShareObserver(EnergyObserver):
    """Gathers a layer's energies, and what they are added to."""

    def __init__(self, ffn: FeedForward):
        super().__init__(ffn)
        self._stream2 = 0.0

    def stream(self, h_TH: torch.Tensor, mask_T: torch.Tensor | None) -> None:
        """See the hidden states of a batch that the layer's output is added to."""
        real_TH = h_TH if mask_T is None else h_TH[mask_T]
        self._stream2 += torch.linalg.vector_norm(real_TH.float()).item() ** 2

    def result(self) -> LayerShare:
        """The statistics gathered so far, on the CPU."""
        energy = super().result()
        stream2_1 = torch.tensor([self._stream2], dtype=torch.float64)
        return LayerShare(groups=energy.groups, **energy.tensors(), stream2_1=stream2_1)
