"""What a compression method is: calibrate -> plan -> apply, one layer at a time.

`compress` drives any `Method`; a new one is a class here or in `baselines/` and one YAML.
Shapes: N micro-experts of a layer's pool.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import torch

from camera.blocks import FeedForward
from camera.budget import Budget
from camera.energy import LayerEnergy

METHODS: dict[str, type["Method"]] = {}


class Method(ABC):
    """A way to choose what of each layer stays; subclasses are dataclasses of their settings."""

    name: ClassVar[str]
    calibrates: ClassVar[bool]  # whether it needs calibration tokens
    compresses: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    def settings(self) -> dict[str, Any]:
        """The settings that change what the method does, for hashes and reports."""
        return asdict(self) if is_dataclass(self) else {}

    @abstractmethod
    def check(self, budget: Budget) -> None:
        """Refuse what can't be done with this model, before any weight is read."""

    @abstractmethod
    def plan(
        self, index: int, ffn: FeedForward, energy: LayerEnergy | None, budget: Budget
    ) -> torch.Tensor:
        """bool [N]: the micro-experts of layer `index` that stay."""
