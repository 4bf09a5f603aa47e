"""Control: seeded random scores under the same budget."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.calibration.statistics import LayerStatistics
from camera.pruning.micro_experts import MicroExpertPruning


@dataclass
class Random(MicroExpertPruning):
    """The floor that any score must beat: the same slicer and budget, a seeded random plan."""

    name: ClassVar[str] = "random"
    calibrates: ClassVar[bool] = False

    seed: int = 1234

    def scores(self, index: int, seen: LayerStatistics | None, micro_experts: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        return torch.rand(micro_experts, generator=generator, dtype=torch.float64)
