"""The interface of an observer of a layer's experts, and what it is called with.

Shapes: T tokens of a batch, N tokens of one expert, H hidden, W width of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from camera.moe.experts.group import ExpertGroup
    from camera.moe.grouped.call import GroupCall


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One expert on the tokens of one batch; padding left out.

    tokens_N are positions in the batch (None: all of them), x_NH inputs in the model's precision,
    h_NW activations (fp32) before the routing weight a_N (None for 1).
    """

    group: ExpertGroup
    expert: int
    batch: int
    tokens_N: torch.Tensor | None
    x_NH: torch.Tensor
    h_NW: torch.Tensor
    a_N: torch.Tensor | None

    @property
    def phi_NW(self) -> torch.Tensor:
        """Micro-expert outputs phi = a * h."""
        return self.h_NW if self.a_N is None else self.h_NW * self.a_N[:, None]


class Observer:
    """Base of what looks at a layer's experts while it runs; ignores everything."""

    reads_hidden: bool = False  # whether `ffn_input` reads the residual stream

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls) and "together" not in vars(cls):
            cls.together = Observer.together  # an inherited one would pass by what is new here

    def ffn_input(
        self,
        batch: int,
        x_TH: torch.Tensor,
        hidden_TH: torch.Tensor | None,
        mask_T: torch.Tensor | None,
    ) -> None:
        """Called once a batch, before its experts: the FFN's input, and the hidden states that its
        output is added to."""

    def waited(self, batch: int) -> None:
        """Called in a batch whose experts are computed together, where the host has just waited for
        the device: what was asked of it in earlier batches is there."""

    def __call__(self, call: ExpertCall) -> None:
        """Called once for every batch and expert that tokens reach."""

    def together(self, call: GroupCall) -> None:
        """Called instead, once for every batch and group, where an accelerator computes all experts
        of a group together; shows each one to `__call__` unless a class knows better."""
        for each in call.each():
            self(each)
