"""What the loss would feel of a micro-expert's removal if the others of its expert stood in for it.

Shapes: N micro-experts of a layer's pool, W width of one expert, F = sum of W^2 over the experts
(their Gram matrices, one after the other).
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import torch

from camera.blocks import FeedForward
from camera.gradients import ExpertGradients
from camera.residual import ExpertGrams, unexplained_shares
from camera.sensitivity import LayerSensitivity, Normalize, SensitivityObserver


@dataclass
class LayerSurgeon(LayerSensitivity):
    """A layer's sensitivities, and the share_N (fp64) of each micro-expert that is its own."""

    kind: ClassVar[str] = "surgeon"
    share_N: torch.Tensor

    def surgeon(self, normalize: Normalize = "routed") -> torch.Tensor:
        """s_i = mean((phi_i * dloss/dphi_i)^2) * share_i, fp64 [N]; -1 if no token came.

        share_i is what of phi_i is no combination of the expert's other phi, of its squared norm:
        what compensation can't make up for (as in optimal brain surgeon; see `unexplained`). Tokens
        count as much as the loss feels the expert there, |dloss/dh_t|^2.
        """
        score_N = self.joint(normalize)
        return torch.where(score_N > 0, score_N * self.share_N, score_N)


@dataclass
class LayerSurgeonGrams(LayerSensitivity):
    """Sensitivities, and gram_F = sum_t |dloss/dh_t|^2 h_t h_t^T of each expert in turn, fp32."""

    kind: ClassVar[str] = "surgeon grams"
    reduced: ClassVar[dict[str, str]] = LayerSensitivity.reduced | {"gram_F": "sum"}
    gram_F: torch.Tensor

    @cached_property
    def share_N(self) -> torch.Tensor:
        """The share of every micro-expert that is its own; the experts are solved one by one."""
        return unexplained_shares(self.gram_F, self.basis_N, self.widths)

    def stored(self) -> LayerSurgeon:
        """The shares instead of the matrices, which are as large as the layer."""
        seen = {f.name: getattr(self, f.name) for f in fields(LayerSensitivity)}
        return LayerSurgeon(**seen, share_N=self.share_N)


class SurgeonObserver(SensitivityObserver):
    """Gathers a layer's sensitivities and Gram matrices from one backward pass."""

    def __init__(self, ffn: FeedForward):
        super().__init__(ffn)
        self._grams = ExpertGrams(ffn)

    def __call__(self, seen: ExpertGradients) -> None:
        super().__call__(seen)
        felt_N1 = torch.linalg.vector_norm(seen.dh_NW, dim=1, keepdim=True)
        self._grams.add(seen.group, seen.expert, seen.h_NW * felt_N1)

    def result(self) -> LayerSurgeonGrams:
        """The statistics gathered so far, on the CPU."""
        seen = super().result()
        gram_F = self._grams.gram_F.cpu()
        return LayerSurgeonGrams(groups=seen.groups, **seen.tensors(), gram_F=gram_F)
