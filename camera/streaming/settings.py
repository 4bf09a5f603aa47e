"""Memory choices of a run."""

from dataclasses import dataclass
from typing import Literal

from camera.runtime.errors import CameraError

CHOICES = {
    "phi": ("auto", "keep", "recompute"),
    "hidden": ("auto", "ram", "disk"),
    "experts": ("auto", "ram", "disk"),
}


@dataclass(frozen=True)
class Memory:
    """Where memory may be saved, each `auto` by size.

    phi: a layer's micro-expert outputs are kept until it is cut, or computed again. hidden: the
    hidden states between layers are in ram or memory-mapped from disk. experts: the layer's routed
    experts are loaded together, to ram, or one at a time from disk.
    """

    phi: Literal["auto", "keep", "recompute"] = "auto"
    hidden: Literal["auto", "ram", "disk"] = "auto"
    experts: Literal["auto", "ram", "disk"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise CameraError(
                    f"memory.{name}={getattr(self, name)} is none of {', '.join(choices)}."
                )
