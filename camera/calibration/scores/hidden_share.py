"""Energies divided by the norm of the residual stream, comparable across layers.

Shapes: T tokens, H hidden, N tokens of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from camera.calibration.observers import ObserverSpec
from camera.calibration.scores.energy import EnergyObserver, EnergyScore, EnergyStatistics
from camera.moe.feed_forward import FeedForward
from camera.moe.observer import ExpertCall
from camera.moe.pool import LayerShape


@dataclass
class HiddenShareStatistics(EnergyStatistics):
    """Energies of phi_ti / |h_t|, h_t the hidden states to which the layer's output is added.

    The next layer normalises hidden states, so relative energy measures the effect on the loss
    equally in all layers. The division is by token: a few tokens have states many times as large
    as all others, and would else dominate the sum.
    """

    kind: ClassVar[str] = "relative"


class HiddenShareObserver(EnergyObserver):
    """Gathers a layer's energies, each token's divided by the norm of its hidden state."""

    reads_hidden = True

    def __init__(self, ffn: FeedForward):
        super().__init__(ffn)
        self._shares: dict[int, torch.Tensor] = {}  # 1 / |h_t|, [T] of each batch

    def ffn_input(
        self,
        batch: int,
        x_TH: torch.Tensor,
        hidden_TH: torch.Tensor | None,
        mask_T: torch.Tensor | None,
    ) -> None:
        norm_T = torch.linalg.vector_norm(hidden_TH.float(), dim=1)
        self._shares[batch] = 1 / norm_T.clamp(min=torch.finfo(torch.float32).tiny)

    def __call__(self, call: ExpertCall) -> None:
        share_N = self._shares[call.batch]
        if call.tokens_N is not None:
            share_N = share_N[call.tokens_N.to(share_N.device)]
        super().__call__(replace(call, a_N=share_N if call.a_N is None else call.a_N * share_N))

    def result(self) -> HiddenShareStatistics:
        """The statistics gathered so far, on the CPU."""
        energy = super().result()
        return HiddenShareStatistics(groups=energy.groups, **energy.tensors())


@dataclass(frozen=True)
class HiddenShareSpec(ObserverSpec):
    """Relative energies of every alpha."""

    statistics: ClassVar[type[HiddenShareStatistics]] = HiddenShareStatistics

    def nbytes(self, layer: LayerShape) -> int:
        """A number per token."""
        return 4 * layer.tokens

    def build(self, index: int, ffn: FeedForward) -> HiddenShareObserver:
        return HiddenShareObserver(ffn)


@dataclass(frozen=True)
class HiddenShareScore(EnergyScore):
    """Energy relative to the hidden states it is added to."""

    name: ClassVar[str] = "hidden_share"

    def observer(self) -> ObserverSpec:
        return HiddenShareSpec()
