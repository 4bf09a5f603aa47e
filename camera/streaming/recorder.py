"""A stand-in for a decoder layer that records its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from camera.runtime.errors import CameraError


class ArgumentRecorder(nn.Module):
    """Stands in for a decoder layer: keeps the arguments of its last call, and returns its input or
    the `output` it was made with.

    tokens_of: the argument by which a layer is handed the tokens that the one before it attended
    to, and how many these are at most. Samples that aren't longer attend to all tokens, so that
    layers which run one by one can be given these.
    """

    def __init__(
        self,
        layer: nn.Module,
        output: torch.Tensor | None = None,
        tokens_of: tuple[str, int] | None = None,
    ):
        super().__init__()
        self.tokens_of = tokens_of
        self.call: tuple[torch.Tensor, dict[str, Any]] | None = None
        self.output = output
        for name, value in vars(layer).items():  # plain facts a model may ask a layer for
            if isinstance(value, (str, int, float)) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if self.tokens_of is not None:
            kwargs[self.tokens_of[0]] = self._all_tokens(hidden_states)
        self.call = (hidden_states, kwargs)
        out = hidden_states if self.output is None else self.output
        return out if self.tokens_of is None else (out, None)

    def _all_tokens(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        samples, length, _ = hidden_BLH.shape
        if length > self.tokens_of[1]:
            raise CameraError(
                f"this model attends to {self.tokens_of[1]} tokens at a time, and layers that run "
                f"one by one can't be told which of {length}: set calibration.length to "
                f"{self.tokens_of[1]} or less, or evaluation.stream=never."
            )
        token_L = torch.arange(length, dtype=torch.int32, device=hidden_BLH.device)
        return token_L.expand(samples, length, length)
