"""A method of your own: prune the micro-experts of smallest largest activation.

A score reads statistics of a layer and returns a number for each micro-expert; the lowest are
pruned. Here the statistics are those of Camera-P's energies. docs/extending.md goes on from here.
"""

from dataclasses import dataclass
from typing import ClassVar

from _common import CALIBRATION, DATA, MODEL, OUT

import camera
from camera.calibration.scores.energy import EnergyScore
from camera.pruning.micro_experts import MicroExpertPruning


class LargestActivation(EnergyScore):
    """max over tokens of φ², without the norm of down's column."""

    name = "largest_activation"

    def values(self, seen):
        return seen.max2_N.double()


@dataclass(frozen=True)
class Largest(MicroExpertPruning):
    """Everything but the score is inherited: budget, slicing, refit, resuming, reports."""

    name: ClassVar[str] = "largest"

    def ranked_by(self):
        return LargestActivation()


for method in (Largest(sparsity=0.4), camera.CameraP(sparsity=0.4)):
    result = camera.compress(
        MODEL, method, OUT / method.name, calibration=CALIBRATION, data=DATA, progress=False
    )
    narrowest = min(min(widths) for widths in result.widths.values())
    print(f"{method.name:<10} narrowest expert keeps {narrowest} micro-experts")
