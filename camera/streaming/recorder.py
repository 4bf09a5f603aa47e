"""A stand-in for a decoder layer that records its arguments."""

from typing import Any

import torch
from torch import nn


class Recorder(nn.Module):
    """Stands in for a decoder layer and keeps the arguments of its last call."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.call: tuple[torch.Tensor, dict[str, Any]] = ()
        for name, value in vars(layer).items():  # plain facts a model may ask a layer for
            if isinstance(value, (str, int, float)) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.call = (hidden_states, kwargs)
        return hidden_states
