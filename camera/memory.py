"""What a run keeps in memory, what it keeps on disk, and how much that will take."""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from camera.errors import CameraError
from camera.skeleton import Skeleton

PHI_LIMIT = 8 * 2**30  # bytes of phi of one layer that `phi=auto` keeps
HIDDEN_SHARE = 0.3  # of the memory that is free: more than that of hidden states goes to disk
LAYERS_HELD = 3  # one computed, one read ahead or converted, one cut or written behind
HIDDEN_HELD = 3  # the layer's inputs, its FFN's inputs, and those the last layer is recorded with
CHOICES = {
    "phi": ("auto", "keep", "recompute"),
    "hidden": ("auto", "ram", "disk"),
    "experts": ("auto", "layer", "visit"),
}


@dataclass(frozen=True)
class Memory:
    """Where memory may be saved, each `auto` by size.

    phi: a layer's micro-expert outputs are kept until it is cut, or computed again. hidden: the
    hidden states between layers are in ram or memory-mapped from disk. experts: the layer's routed
    experts are loaded together, or visited one by one from the shards.
    """

    phi: Literal["auto", "keep", "recompute"] = "auto"
    hidden: Literal["auto", "ram", "disk"] = "auto"
    experts: Literal["auto", "layer", "visit"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise CameraError(
                    f"memory.{name}={getattr(self, name)} is none of {', '.join(choices)}."
                )


@dataclass(frozen=True)
class Needs:
    """What a run takes, in bytes, and what that decides."""

    layer: int  # the largest, as it is computed
    hidden: int  # one table of hidden states
    phi: int  # of the widest layer
    keep_phi: bool
    hidden_on_disk: bool
    visit: bool
    experts: int  # of the largest layer, routed

    @property
    def peak(self) -> int:
        """What the run adds to the process: c1 * largest layer + c2 * hidden states + phi."""
        layer = self.layer - self.experts if self.visit else self.layer
        hidden = 0 if self.hidden_on_disk else self.hidden
        return LAYERS_HELD * layer + HIDDEN_HELD * hidden + self.phi * self.keep_phi

    def __str__(self) -> str:
        visited = ", its experts visited one by one" if self.visit else ""
        place = "on disk" if self.hidden_on_disk else "in memory"
        phi = "kept" if self.keep_phi else "computed again"
        return (
            f"about {_gb(self.peak)} beside the process itself (largest layer {_gb(self.layer)}"
            f"{visited}, hidden states {_gb(self.hidden)} {place}, phi {_gb(self.phi)} {phi})"
        )


def needs(skeleton: Skeleton, memory: Memory, tokens: int, slices: bool) -> Needs:
    """What a run over so many calibration tokens takes; `slices`: the method only cuts layers.

    What changes rounding (phi, experts) is decided by sizes alone, never by what is free now.
    """
    size = skeleton.dtype.itemsize
    layers = [sum(p.numel() for p in layer.parameters()) * size for layer in skeleton.layers]
    experts = [
        sum(group.module_size for group in skeleton.feed_forward(i).groups if group.routed) * size
        for i in range(len(layers))
    ]
    hidden = tokens * skeleton.config.hidden_size * size
    phi = int(tokens * _active_width(skeleton) * size)
    visit = memory.experts == "visit"
    if memory.experts == "auto":
        visit = LAYERS_HELD * max(layers) > _total(skeleton.device) and not skeleton.compressed
    keep_phi = memory.phi == "keep" or (memory.phi == "auto" and phi <= PHI_LIMIT)
    on_disk = memory.hidden == "disk"
    if memory.hidden == "auto":
        on_disk = HIDDEN_HELD * hidden > HIDDEN_SHARE * psutil.virtual_memory().available
    return Needs(
        max(layers),
        hidden,
        phi,
        keep_phi and slices and not visit and tokens > 0,
        on_disk,
        visit,
        max(experts),
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _active_width(skeleton: Skeleton) -> float:
    """Micro-experts that a token reaches, in the widest layer."""
    top_k = getattr(skeleton.config, "num_experts_per_tok", 1)
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
