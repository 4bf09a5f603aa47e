"""A model known by its config alone, and what a run of it would decide on a card."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from camera.checkpoint.quantized.fp8 import STEP
from camera.method import METHODS
from camera.moe.budget import budget_of
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.pipeline.memory.estimate import MemoryEstimate
from camera.streaming.settings import MemoryChoices


class PaperModel:
    """A model without memory and without files, with what the estimate of memory asks of one."""

    device = torch.device("cpu")
    compressed = None

    def __init__(self, config: Any, dtype: torch.dtype):
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.config, self.dtype, self.family = config, dtype, family_of(config.model_type)
        self.text_config = config.get_text_config()
        self.layers: nn.ModuleList = self.model.base_model.layers
        self.unpacking = unpacking(self.layers, config)
        self.root = f"{self.model.base_model_prefix}.layers"
        self.budget = budget_of(self.model, self.layers, self.family, self.root)

    def feed_forward(self, index: int) -> FeedForward:
        """The view of a layer that methods work on."""
        return FeedForward(self.layers[index], self.family, f"{self.root}.{index}")


def unpacking(layers: nn.Module, config: Any) -> int:
    """Bytes that unpacking the largest matrix takes, where the source is in FP8."""
    told = getattr(config, "quantization_config", None) or {}
    if told.get("quant_method") != "fp8":
        return 0
    return 8 * STEP + max(p.numel() for p in layers.parameters() if p.dim() == 2)


def estimate(
    config: Any,
    tokens: int,
    length: int,
    sparsity: float,
    dtype: torch.dtype,
    card: int | None,
    host: int | None = None,
) -> MemoryEstimate:
    """What Camera-P would say before it starts, on a card of so many bytes (None: on a CPU), in a
    system with so many free (None: as many as here)."""
    model = PaperModel(config, dtype)
    method = METHODS["camera_p"](sparsity=sparsity)
    passes = method.passes(model.budget, "compressed")
    return MemoryEstimate.of(model, method, passes, MemoryChoices(), tokens, length, card, host)
