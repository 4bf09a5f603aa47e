"""Camera-P, and the plans it must be compared with: random and nothing at all.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from camera.blocks import FeedForward
from camera.budget import Budget, to_remove
from camera.energy import LayerEnergy
from camera.errors import CameraError
from camera.method import Method
from camera.plan import keep_highest


@dataclass
class MicroExpertPruning(Method):
    """Removes the n = int(N * ratio) lowest-scored micro-experts of every layer's pool.

    The ratio is solved from `sparsity` of `sparsity_of` (moe | model | routed; with `routed` the
    shared experts are left alone). `width_multiple` rounds each expert's kept width for kernels,
    `min_width` keeps every expert at least that wide.
    """

    sparsity: float
    sparsity_of: Literal["moe", "model", "routed"] = "moe"
    width_multiple: int = 1
    min_width: int = 0

    def check(self, budget: Budget) -> None:
        if self.width_multiple < 1 or self.min_width < 0:
            raise CameraError(
                f"width_multiple={self.width_multiple} must be at least 1 and "
                f"min_width={self.min_width} at least 0."
            )
        self._ratio(budget)

    def _ratio(self, budget: Budget) -> float:
        return budget.pool_ratio(
            self.sparsity, self.sparsity_of, self.min_width, self.width_multiple
        )

    def score(self, index: int, energy: LayerEnergy | None, micro_experts: int) -> torch.Tensor:
        """The score [N] of a layer's micro-experts: the lowest go."""
        raise NotImplementedError

    def plan(
        self, index: int, ffn: FeedForward, energy: LayerEnergy | None, budget: Budget
    ) -> torch.Tensor:
        ratio = self._ratio(budget)
        widths, pool = ffn.widths, budget.layers[index]
        candidates_N = None
        if self.sparsity_of == "routed":
            candidates_N = torch.repeat_interleave(torch.tensor(pool.routed), torch.tensor(widths))
        prunable = sum(widths) if candidates_N is None else int(candidates_N.sum())
        return keep_highest(
            self.score(index, energy, sum(widths)),
            widths,
            to_remove(prunable, ratio),
            width_multiple=self.width_multiple,
            min_width=self.min_width,
            candidates_N=candidates_N,
        )


@dataclass
class CameraP(MicroExpertPruning):
    """Camera-P: the micro-experts of lowest decoding-time energy go, in all three matrices at once.

    Source: CAMERA (AAAI 2026); `alpha` weighs the L-infinity term of the energy.
    """

    name: ClassVar[str] = "camera_p"
    calibrates: ClassVar[bool] = True

    alpha: float = 0.9

    def check(self, budget: Budget) -> None:
        if not 0 <= self.alpha <= 1:
            raise CameraError(f"alpha={self.alpha} must lie between 0 and 1.")
        super().check(budget)

    def score(self, index: int, energy: LayerEnergy | None, micro_experts: int) -> torch.Tensor:
        return energy.energy(self.alpha)


@dataclass
class Random(MicroExpertPruning):
    """The floor that any score must beat: the same slicer and budget, a seeded random plan."""

    name: ClassVar[str] = "random"
    calibrates: ClassVar[bool] = False

    seed: int = 1234

    def score(self, index: int, energy: LayerEnergy | None, micro_experts: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        return torch.rand(micro_experts, generator=generator, dtype=torch.float64)


@dataclass
class Dense(Method):
    """Nothing is compressed: the first row of every table."""

    name: ClassVar[str] = "dense"
    calibrates: ClassVar[bool] = False
    compresses: ClassVar[bool] = False

    def check(self, budget: Budget) -> None:
        """Any model will do."""

    def plan(
        self, index: int, ffn: FeedForward, energy: LayerEnergy | None, budget: Budget
    ) -> torch.Tensor:
        return torch.ones(sum(ffn.widths), dtype=torch.bool)
