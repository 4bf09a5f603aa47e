"""Bits by layer: one number of bits for all experts of a layer, as serving engines read it.

Shapes: L layers of the pool, B numbers of bits that are offered.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import TYPE_CHECKING, ClassVar

from camera.method import Pass, PassKind, Plan, Propagate, Seen
from camera.quantization.base import Quantization, footprints
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from camera.calibration.statistics import LayerStatistics
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.quantization.plans.layer_bits import LayerBits

GROUP_SIZES = (128, 64, 32)  # that kernels take
log = logging.getLogger("camera")


@dataclass(frozen=True)
class LayerwiseBits(Quantization):
    """All experts of a layer get the same bits, in gate, up and down; layers differ.

    Minimises sum_l error_l(b_l) exactly within the target `bits`, every b_l one of `bit_widths`.
    error_l(b) is measured on the dense model: what rounding the layer's experts to nearest at b
    bits changes the residual stream by, squared and relative, as a mean over tokens. group_size
    divides hidden size and all widths: null takes the largest of 128, 64, 32 that does, else the
    whole row. What it writes exports to compressed-tensors, with a scheme for each layer.
    """

    name: ClassVar[str] = "layerwise_bits"

    bits: float | None = 2.5
    bit_widths: list[int] = field(default_factory=lambda: [2, 3, 4, 8])

    def check(self, budget: Budget) -> None:
        if self.bits is None:
            raise CameraError(f"method {self.name} needs a target: set bits.")
        widths = self.bit_widths
        if not widths or widths != sorted(set(widths) & set(range(2, 9))):
            raise CameraError(
                f"bit_widths={widths} must be different bits from 2 to 8, the fewest first."
            )
        self.divisor(budget)
        super().check(budget)

    def divisor(self, budget: Budget) -> int | None:
        """Inputs that share a scale, in whole groups of every row; None for the whole row.

        CameraError, naming the neighbours, for a group size that leaves a rest.
        """
        if self.group_size == -1:
            return None
        lengths = {budget.hidden, *(w for pool in budget.layers.values() for w in pool.widths)}
        common = gcd(*lengths)
        fitting = [size for size in range(1, common + 1) if common % size == 0]
        if self.group_size is None:
            return next((size for size in GROUP_SIZES if size in fitting), None)
        if self.group_size in fitting:
            return self.group_size
        below = [size for size in fitting if size < self.group_size][-1:]
        above = [size for size in fitting if size > self.group_size][:1]
        raise CameraError(
            f"group_size={self.group_size} doesn't divide rows of "
            f"{', '.join(map(str, sorted(lengths - {0})))}, as engines want: the nearest that do "
            f"are {' and '.join(map(str, below + above))}; or set -1, the whole row."
        )

    def costs(self, budget: Budget) -> dict[int, list[int]]:
        """Stored bits of every layer at each of `bit_widths`."""
        pools = footprints(budget, self.divisor(budget), self.sym, self.scattered)
        return {
            index: [round(pool.uniform_average(bits) * pool.weights) for bits in self.bit_widths]
            for index, pool in pools.items()
        }

    def reachable(self, budget: Budget) -> tuple[float, float]:
        costs, weights = self.costs(budget).values(), self.weights(budget)
        return tuple(sum(of_layer[end] for of_layer in costs) / weights for end in (0, -1))

    def weights(self, budget: Budget) -> int:
        """Weights that are quantised."""
        widths = (width for pool in budget.layers.values() for width in pool.widths)
        return max(3 * budget.hidden * sum(widths), 1)

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        from camera.quantization.layerwise.rounding_error import RoundingErrorSpec
        from camera.quantization.quantizers.quantizer import QUANTIZERS

        spec = RoundingErrorSpec(
            tuple(self.bit_widths), self.divisor(budget), self.sym, self.clip, self.scale_dtype
        )
        last = super().passes(budget, propagate)
        if not QUANTIZERS[self.quantizer].needs_hessian and not self.true_sequential:
            last = (Pass(PassKind.COMPRESSED, tokens=False),)
        return (Pass(PassKind.DENSE, spec), *last)

    def plan(self, seen: Seen, budget: Budget) -> Plan:
        from camera.quantization.layerwise.allocation import least_error, next_cost

        statistics, costs = seen[PassKind.DENSE], self.costs(budget)
        errors = {index: statistics[index].relative().tolist() for index in costs}
        cost_LB, error_LB = list(costs.values()), list(errors.values())
        weights = self.weights(budget)
        most = int(self.bits * weights * (1 + 1e-9))
        choice = least_error(cost_LB, error_LB, most)
        stored = sum(cost[b] for cost, b in zip(cost_LB, choice, strict=True))
        if stored < self.bits * weights * (1 - self.tolerance):
            self.say_missed(
                "the model", stored / weights, next_cost(cost_LB, choice, most) / weights
            )
        self._say_chosen(cost_LB, error_LB, choice, most)
        bits = {str(i): self.bit_widths[b] for i, b in zip(costs, choice, strict=True)}
        told = {
            str(i): dict(zip(map(str, self.bit_widths), e, strict=True)) for i, e in errors.items()
        }
        shared = {"bits": bits, "group_size": self.divisor(budget), "errors": told}
        return replace(super().plan(seen, budget), shared=shared)

    def _say_chosen(
        self,
        cost_LB: Sequence[Sequence[int]],
        error_LB: Sequence[Sequence[float]],
        choice: Sequence[int],
        most: int,
    ) -> None:
        """Log the plan and its error beside that of the same bits everywhere."""
        error = sum(errors[b] for errors, b in zip(error_LB, choice, strict=True))
        fit = [b for b in range(len(self.bit_widths)) if sum(c[b] for c in cost_LB) <= most]
        uniform = min((sum(errors[b] for errors in error_LB), b) for b in fit)
        log.info(
            "bits by layer: %s; their error is %.4g, and at %d bits everywhere it is %.4g",
            " ".join(str(self.bit_widths[b]) for b in choice),
            error,
            self.bit_widths[uniform[1]],
            uniform[0],
        )

    def plan_layer(
        self,
        index: int,
        ffn: FeedForward,
        seen: LayerStatistics | None,
        budget: Budget,
        plan: Plan,
    ) -> LayerBits:
        from camera.quantization.plans.layer_bits import LayerBits

        return LayerBits.uniform(
            ffn.widths, plan.shared["bits"][str(index)], plan.shared["group_size"]
        )
