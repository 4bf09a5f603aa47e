"""Camera-P: prunes micro-experts of lowest decoding-time energy.

https://arxiv.org/abs/2508.02322
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from camera.pruning.micro_experts import MicroExpertPruning

if TYPE_CHECKING:
    from camera.calibration.scores.base import Score


@dataclass(frozen=True)
class CameraP(MicroExpertPruning):
    """Camera-P prunes the micro-experts of lowest decoding-time energy: rows of gate and up,
    columns of down.

    Source: CAMERA (AAAI 2026, arXiv 2508.02322); `alpha` weighs the L-infinity term of the energy.
    """

    name: ClassVar[str] = "camera_p"

    alpha: float = 0.9

    def ranked_by(self) -> Score:
        from camera.calibration.scores.energy import EnergyScore

        return EnergyScore(self.alpha)
