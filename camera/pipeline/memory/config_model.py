"""A model known by its config alone, and what a run of it would decide."""

from typing import Any

import torch
from torch import nn

from camera.checkpoint.modules import build_native
from camera.checkpoint.quantized.fp8 import STEP
from camera.method import METHODS
from camera.moe.budget import budget_of
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.pipeline.memory.estimate import MemoryEstimate
from camera.streaming.meta_build import decoder_of
from camera.streaming.settings import MemoryChoices


class ConfigModel:
    """A model without memory and without files, with what the estimate of memory asks of one."""

    device = torch.device("cpu")
    compressed = None

    def __init__(self, config: Any, dtype: torch.dtype):
        self.config, self.dtype, self.family = config, dtype, family_of(config.model_type)
        self.model = build_native(config, dtype=dtype)
        self.text_config = config.get_text_config()
        self.base = decoder_of(self.model, self.family)
        self.layers: nn.ModuleList = self.base.layers
        self.unpacking = unpacking(self.layers, config)
        modules = self.model.named_modules()
        self.root = next(name for name, part in modules if part is self.layers)
        self.budget = budget_of(self.model, self.layers, self.family, self.root)

    def feed_forward(self, index: int) -> FeedForward:
        """The view of a layer that methods work on."""
        return FeedForward(self.layers[index], self.family, f"{self.root}.{index}")

    def memory(
        self,
        tokens: int,
        length: int,
        sparsity: float,
        card: int | None,
        host: int | None = None,
    ) -> MemoryEstimate:
        """What Camera-P would say before it starts, on a card of so many bytes (None: a CPU), in a
        system with so many free (None: as many as here)."""
        method = METHODS["camera_p"](sparsity=sparsity)
        passes = method.passes(self.budget, "compressed")
        return MemoryEstimate.of(self, method, passes, MemoryChoices(), tokens, length, card, host)


def unpacking(layers: nn.Module, config: Any) -> int:
    """Bytes that unpacking the largest matrix takes, where the source is in FP8."""
    told = getattr(config, "quantization_config", None) or {}
    if told.get("quant_method") != "fp8":
        return 0
    return 8 * STEP + max(p.numel() for p in layers.parameters() if p.dim() == 2)
