"""The interface of a module that holds experts otherwise than transformers does.

Shapes: W width of one expert, H hidden.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn


class ExpertModule:
    """Stands in the place of native experts; `widths` and `act_fn` are those of its experts."""

    holds_native: ClassVar[bool] = False  # whether these are native weights, kept elsewhere
    widths: list[int]
    act_fn: nn.Module

    def gate_up(self, expert: int) -> torch.Tensor:
        """Gate and up of one expert, [2W, H]: gate first."""
        raise NotImplementedError

    def down(self, expert: int) -> torch.Tensor:
        """Down of one expert, [H, W]."""
        raise NotImplementedError

    def materialize(self, experts: Sequence[int]) -> nn.Module:
        """The native module with these experts alone, in memory; where `holds_native`."""
        raise NotImplementedError
