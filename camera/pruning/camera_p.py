"""Camera-P: prunes micro-experts of lowest decoding-time energy."""

from dataclasses import dataclass
from typing import ClassVar

from camera.calibration.scores.base import Score, Scored
from camera.pruning.micro_experts import MicroExpertPruning


@dataclass
class CameraP(Scored, MicroExpertPruning):
    """Camera-P: the micro-experts of lowest decoding-time energy go, in all three matrices at once.

    Source: CAMERA (AAAI 2026); `alpha` weighs the L-infinity term of the energy.
    """

    name: ClassVar[str] = "camera_p"
    calibrates: ClassVar[bool] = True

    alpha: float = 0.9

    @property
    def ranked_by(self) -> Score:
        return Score("energy", self.alpha)
