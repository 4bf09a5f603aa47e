"""Stages of a batch on its way through a layer, as values.

LayerInput -attend-> FfnInput -forward-> LayerInput of the next layer; where a layer is pruned in
between: FfnInput -> FfnPhi -> FfnOutput -> LayerInput.

Shapes: B samples of a batch, L tokens of a sample, H hidden, T = B * L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from camera.moe.grouped.sinks import ExpertPhi, GroupPhi


@dataclass(frozen=True)
class Arguments:
    """The arguments that the model passes to each layer, and the tokens that aren't padding."""

    kwargs: list[dict[str, Any]]
    mask_T: torch.Tensor | None


@dataclass(frozen=True)
class LayerInput:
    """Hidden states before a layer."""

    arguments: Arguments
    hidden_BLH: torch.Tensor


@dataclass(frozen=True)
class FfnInput:
    """A layer after its attention: the FFN's input, and the residual that its output is added
    to."""

    arguments: Arguments
    residual_BLH: torch.Tensor
    x_BLH: torch.Tensor

    @property
    def tokens(self) -> int:
        """T of the batch."""
        return self.x_BLH[..., 0].numel()


@dataclass(frozen=True)
class FfnPhi:
    """phi of every expert of a layer, or of its routed ones, until the layer is pruned."""

    at: FfnInput
    calls: list[ExpertPhi | GroupPhi]
    routed: bool = False


@dataclass(frozen=True)
class FfnOutput:
    """The output of the FFN, before it is added to the residual."""

    at: FfnInput
    y_TH: torch.Tensor
