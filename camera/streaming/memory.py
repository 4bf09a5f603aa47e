"""What a run keeps in memory, what it keeps on disk, and how much that will take."""

import psutil
import torch
from torch import nn

from camera.streaming.skeleton import Skeleton

HIDDEN_SHARE = 0.3  # of the memory that is free: more than that of hidden states goes to disk


HIDDEN_HELD = 3  # the layer's inputs, its FFN's inputs, and those the last layer is recorded with


BATCH_TOKENS = 8192  # that go through a layer together
BACKWARD_TOKENS = 4096  # that go back through a layer together


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active_width(skeleton: Skeleton) -> float:
    """Micro-experts that a token reaches, in the widest layer."""
    top_k = skeleton.family.top_k(skeleton.config)
    widest = 0.0
    for pool in skeleton.budget.layers.values():
        routed = sum(pool.routed)
        active = sum(
            width * top_k / routed if is_routed else width
            for width, is_routed in zip(pool.widths, pool.routed, strict=True)
        )
        widest = max(widest, active)
    return widest


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
