"""Camera-Plus: micro-experts ranked over all layers by the loss, and what stays is refitted.

Shapes: N micro-experts of a layer's pool.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from camera.blocks import FeedForward
from camera.budget import Budget
from camera.energy import EnergyObserver, LayerEnergy
from camera.errors import CameraError
from camera.prune import MicroExpertPruning
from camera.sensitivity import SensitivityObserver

SCORES = ("energy", "fisher", "product")


@dataclass
class CameraPlus(MicroExpertPruning):
    """Camera-Plus: one budget for all layers, by Fisher information, and least squares afterwards.

    `score` energy is Camera-P's (with `alpha`), fisher sum over tokens of (phi * dloss/dphi)^2,
    product HEAPr's. Gradients take one backward pass.
    """

    name: ClassVar[str] = "camera_plus"
    calibrates: ClassVar[bool] = True

    score: Literal["energy", "fisher", "product"] = "fisher"
    alpha: float = 0.0
    rank_scope: Literal["layer", "global"] = "global"
    normalize: Literal["routed", "all"] = "all"
    compensate: Literal["none", "expert", "layer"] = "layer"

    @property
    def backward(self) -> bool:
        return self.score != "energy"

    def check(self, budget: Budget) -> None:
        if self.score not in SCORES:
            raise CameraError(f"method.score={self.score} is none of {', '.join(SCORES)}.")
        super().check(budget)

    def statistics_key(self) -> dict[str, Any]:
        return {"kind": "sensitivity" if self.backward else "energy"}

    def observer(self, index: int, ffn: FeedForward) -> Any:
        return SensitivityObserver(ffn) if self.backward else EnergyObserver(ffn)

    def scores(self, index: int, seen: LayerEnergy, micro_experts: int) -> torch.Tensor:
        if self.score == "fisher":
            return seen.joint(self.normalize)
        return seen.product(self.normalize) if self.score == "product" else seen.energy(self.alpha)
