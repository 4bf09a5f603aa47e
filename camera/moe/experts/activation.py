"""The activation of an expert: h of its products with gate and up."""

from collections.abc import Callable

import torch
from torch import nn

Activation = Callable[..., torch.Tensor]
"""act(gate), which up is multiplied by, or a `ClampedGate` of both."""


class ClampedGate(nn.Module):
    """h = g sigmoid(alpha g) (u + 1), with g = min(gate, limit) and u = up within limit (gpt-oss).

    As act(gate) * up, it is 0 where gate is: an expert may be padded with zeros.
    """

    def __init__(self, alpha: float, limit: float):
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, limit={self.limit}"


def gated(act_fn: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """h = act(gate) * up, or what an activation of both says."""
    return act_fn(gate, up) if isinstance(act_fn, ClampedGate) else act_fn(gate) * up
