"""Memory choices of a run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from camera.runtime.errors import CameraError


@dataclass(frozen=True)
class MemoryChoices:
    """Choices that save memory, each `auto` by size.

    phi: activations of one layer are kept until it is pruned, of all its experts or of the routed
    ones alone, or recomputed. hidden: hidden states
    between layers are on the device, in RAM or memory-mapped from disk. experts: a layer's routed
    experts are loaded into RAM together, or stay on disk and are loaded one at a time.
    """

    phi: Literal["auto", "keep", "routed", "recompute"] = "auto"
    hidden: Literal["auto", "device", "ram", "disk"] = "auto"
    experts: Literal["auto", "ram", "disk"] = "auto"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in (f.name for f in fields(self)):
            choices, value = get_args(hints[name]), getattr(self, name)
            if value not in choices:
                raise CameraError(f"memory.{name}={value} is none of {', '.join(choices)}.")
