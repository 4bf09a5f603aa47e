"""GPTQ: the same bits for every weight of every expert.

https://arxiv.org/abs/2210.17323
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, ClassVar

from camera.method import Plan, Seen
from camera.quantization.base import Quantization, footprints
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from camera.calibration.statistics import LayerStatistics
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.quantization.plans.layer_bits import LayerBits


@dataclass(frozen=True)
class Gptq(Quantization):
    """Every weight of the pool gets the same whole number of bits, solved by GPTQ.

    The target `bits` counts scales and zeros: 2.25 is 2 bits with a scale and a zero (16 bits each)
    per 128 weights. The largest number of bits is taken that a group size allows (without
    `group_size`: the smallest multiple of 8 that stays within the target), which may store up to
    5 % less than the target; where nothing comes that close, the target is refused.
    Source: Frantar et al. (ICLR 2023, arXiv 2210.17323).
    """

    name: ClassVar[str] = "gptq"
    # uniform bits and a group size can't meet every target
    tolerance: ClassVar[float] = 0.05

    bits: float | None = 2.25

    def check(self, budget: Budget) -> None:
        super().check(budget)
        self.solve(budget)

    def reachable(self, budget: Budget) -> tuple[float, float]:
        return 0.0, float("inf")  # `solve` knows better

    def solve(self, budget: Budget) -> tuple[int, int | None]:
        """Bits and group size for the target; CameraError, naming the next best, if none fits."""
        from camera.checkpoint.formats.packed.codes import MAX_BITS
        from camera.quantization.plans.bit_plan import solve_group_size

        if self.bits is None:
            raise CameraError(f"method {self.name} needs a target: set bits.")
        pools = Counter(footprints(budget, None, self.sym, self.scattered).values())
        weights = sum(pool.weights * layers for pool, layers in pools.items())
        longest = max(max(pool.hidden, *pool.widths) for pool in pools)

        def stored(bits: int, size: int | None) -> float:
            sized = {replace(pool, group_size=size): layers for pool, layers in pools.items()}
            return sum(p.uniform_average(bits) * p.weights * layers for p, layers in sized.items())

        near = []
        for bits in range(MAX_BITS, 0, -1):
            size = None if self.group_size == -1 else self.group_size
            if self.group_size is None:
                size = solve_group_size(partial(stored, bits), weights, self.bits, longest)
            near.append(stored(bits, size) / max(weights, 1))
            if near[-1] <= self.bits * (1 + 1e-9):
                break
        if self.bits * (1 - self.tolerance) <= near[-1] <= self.bits * (1 + 1e-9):
            return bits, size
        raise CameraError(
            f"bits={self.bits} can't be met by the same bits everywhere: the nearest that this "
            f"model can store are {' and '.join(f'{n:.4g}' for n in near[-2:])} bits per weight, "
            f"scales included; set bits={ceil(1000 * near[-2:][0]) / 1000:g} or group_size."
        )

    def plan(self, seen: Seen, budget: Budget) -> Plan:
        bits, size = self.solve(budget)
        return replace(super().plan(seen, budget), shared={"bits": bits, "group_size": size})

    def plan_layer(
        self,
        index: int,
        ffn: FeedForward,
        seen: LayerStatistics | None,
        budget: Budget,
        plan: Plan,
    ) -> LayerBits:
        from camera.quantization.plans.layer_bits import LayerBits

        return LayerBits.uniform(ffn.widths, plan.shared["bits"], plan.shared["group_size"])
