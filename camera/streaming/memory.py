"""Sizes of layers and batches, and the machine's memory."""

import torch
from torch import nn

from camera.runtime.device.host_memory import free_host_memory, total_host_memory
from camera.streaming.skeleton import MetaModel

HIDDEN_SHARE = 0.3  # of the memory that is free: more than that of hidden states goes to disk
HIDDEN_HELD = 3  # the layer's inputs, its FFN's inputs, and those the last layer is recorded with
BATCH_TOKENS = 8192  # that go through a layer together
BACKWARD_TOKENS = 4096  # that go back through a layer together


def parameters_of(module: nn.Module) -> int:
    """Numbers that a module holds."""
    return sum(parameter.numel() for parameter in module.parameters())


def active_width(skeleton: MetaModel) -> float:
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


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, on a CPU in the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory, on a CPU of the system's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return total_host_memory()
