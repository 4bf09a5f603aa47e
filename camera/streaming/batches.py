"""Batches of tokens on their way through the layers."""

from dataclasses import dataclass
from typing import Any

import torch

from camera.moe.capture import Output, Trace


@dataclass
class Batch:
    """One batch on its way through the layers."""

    hidden_BLH: torch.Tensor  # kept on the CPU between layers
    kwargs: list[dict[str, Any]]  # what the model itself passes to each layer
    mask_T: torch.Tensor | None  # False where a token is padding
    ffn_input_BLH: torch.Tensor | None = None
    trace: Trace | None = None
    output: Output | None = None
