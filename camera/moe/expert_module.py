"""The interface of a module of experts that isn't one of transformers.

Shapes: W width of one expert, H hidden.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn


class ExpertModule:
    """Experts in the place of a native module.

    widths and act_fn are those of its experts. holds_native: native weights, kept elsewhere.
    """

    holds_native: ClassVar[bool] = False
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
