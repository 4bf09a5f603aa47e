"""The interface of an observer of a layer's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from camera.moe.capture import ExpertCall


class Observer:
    """Base of what looks at a layer's experts while it runs; ignores everything."""

    reads_hidden: bool = False  # whether `ffn_input` reads the residual stream

    def ffn_input(
        self,
        batch: int,
        x_TH: torch.Tensor,
        hidden_TH: torch.Tensor | None,
        mask_T: torch.Tensor | None,
    ) -> None:
        """Called once a batch, before its experts: the FFN's input, and the hidden states that its
        output is added to."""

    def __call__(self, call: ExpertCall) -> None:
        """Called once for every batch and expert that tokens reach."""
