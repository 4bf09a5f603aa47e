"""Control: seeded random scores under the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from camera.calibration.scores.base import Score
from camera.moe.pool import layer_seed
from camera.pruning.micro_experts import MicroExpertPruning

if TYPE_CHECKING:
    import torch

    from camera.calibration.statistics import LayerStatistics


@dataclass(frozen=True)
class RandomScore(Score):
    """Uniform random numbers, drawn for each layer by the seed."""

    name: ClassVar[str] = "random"

    seed: int = 1234

    def of_layer(self, index: int, seen: LayerStatistics | None, count: int) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(layer_seed(self.seed, index))
        return torch.rand(count, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Random(MicroExpertPruning):
    """Control: seeded random scores under the same budget."""

    name: ClassVar[str] = "random"

    seed: int = 1234

    @property
    def reads_text(self) -> bool:
        return self.compensate != "none"

    def ranked_by(self) -> Score:
        return RandomScore(self.seed)
