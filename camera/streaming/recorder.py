"""A stand-in for a decoder layer that records its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ArgumentRecorder(nn.Module):
    """Stands in for a decoder layer: keeps the arguments of its last call, and returns its input or
    the `output` it was made with."""

    def __init__(self, layer: nn.Module, output: torch.Tensor | None = None):
        super().__init__()
        self.call: tuple[torch.Tensor, dict[str, Any]] | None = None
        self.output = output
        for name, value in vars(layer).items():  # plain facts a model may ask a layer for
            if isinstance(value, (str, int, float)) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.call = (hidden_states, kwargs)
        return hidden_states if self.output is None else self.output
