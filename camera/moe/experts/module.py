"""The interface of a module of experts that isn't one of transformers.

Shapes: W width of one expert, H hidden.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from camera.moe.experts.activation import Activation
from camera.moe.experts.layout import ExpertLayout


class ExpertModule:
    """Experts in the place of a native module.

    widths and act_fn are those of its experts; layout: that of the native module. holds_native:
    native weights, kept elsewhere.
    """

    holds_native: ClassVar[bool] = False
    widths: list[int]
    act_fn: Activation
    layout: ExpertLayout = ExpertLayout()

    def gate_up(self, expert: int) -> torch.Tensor:
        """Gate and up of one expert, [2W, H]: gate first."""
        raise NotImplementedError

    def down(self, expert: int) -> torch.Tensor:
        """Down of one expert, [H, W]."""
        raise NotImplementedError

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        """Biases of gate and up of one expert, [2W]: gate first; None where there are none."""
        return None

    def down_bias(self, expert: int) -> torch.Tensor | None:
        """What one expert adds to its output, [H]; None where it has no bias."""
        return None

    def materialize(self, experts: Sequence[int]) -> nn.Module:
        """The native module with these experts alone, in memory; where `holds_native`."""
        raise NotImplementedError
