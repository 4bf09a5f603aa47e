"""What every quantising method shares: settings, the target, Hessians, the solver, the report.

A method says which bits (`plan`); everything else is here and in camera/quantization/layer.py.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from camera.calibration.hessians import HessianObserver, LayerHessians, hessian_bytes
from camera.calibration.statistics import LayerStatistics
from camera.checkpoint.formats.packed.footprint import Footprint
from camera.checkpoint.formats.packed.spec import (
    spec_bytes,
    spec_code_bits,
)
from camera.compensation.settings import Refit
from camera.method import Method, Outcome
from camera.moe.budget import Budget
from camera.moe.feed_forward import FeedForward
from camera.quantization.bit_plan import ExpertBits
from camera.quantization.gptq import GPTQ
from camera.quantization.grids import CLIPS
from camera.quantization.layer import SOLVE_BYTES, solve_layer, solving_bytes
from camera.quantization.outside_experts import round_outside
from camera.runtime import distributed
from camera.runtime.errors import CameraError

GROUP_SIZE = 128
CLOSE = 0.01  # share of the target by which a plan may stay below it


@dataclass
class Quantization(Method):
    """Quantises all experts of a layer's pool by one solver; subclasses plan the bits.

    bits: the target, stored bits per weight on average over the quantised weights, scales and zeros
    included (null: whatever the other settings give). group_size: inputs that share a scale, -1 for
    the whole row, null to have it chosen. sym: no zeros. clip: range search (none, gptq, mc).
    act_order, static_groups, damping, fallback, min_tokens: see camera.quantization.gptq.GPTQ.
    weighted_hessian counts a token by its squared routing weight. true_sequential takes down's
    Hessian from the quantised gate and up, on the first `sequential_tokens` inputs of an expert;
    compensate expert refits down to these before it is quantised (see `camera.compensation.least_squares`).
    attn_bits, router_bits: round attention and router to nearest before the layer is run (null:
    left alone).
    """

    calibrates: ClassVar[bool] = True
    storable: ClassVar[bool] = False

    bits: float | None = None
    group_size: int | None = None
    sym: bool = False
    clip: Literal["none", "gptq", "mc"] = "none"
    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    fallback: Literal["rtn", "mean_hessian"] = "rtn"
    min_tokens: int = 1
    weighted_hessian: bool = False
    true_sequential: bool = False
    sequential_tokens: int = 8192
    compensate: Literal["none", "expert"] = "none"
    attn_bits: int | None = None
    router_bits: int | None = None

    @abstractmethod
    def plan(
        self, index: int, ffn: FeedForward, seen: Any, budget: Budget
    ) -> tuple[list[ExpertBits], int | None]:
        """The bits of every expert of a layer's pool, and the group size (None: whole rows)."""

    def reachable(self, budget: Budget) -> tuple[float, float]:
        """The least and the most stored bits that the settings can give this model."""
        raise NotImplementedError

    def check(self, budget: Budget) -> None:
        if self.clip not in CLIPS:
            raise CameraError(f"clip={self.clip} is none of {', '.join(CLIPS)}.")
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise CameraError("group_size must be at least 1, -1 (the whole row) or null.")
        for key in ("attn_bits", "router_bits"):
            value = getattr(self, key)
            if value is not None and not 1 <= value <= 8:
                raise CameraError(f"{key}={value} must lie between 1 and 8, or be null.")
        if self.compensate not in ("none", "expert"):
            raise CameraError(f"compensate={self.compensate} is none of none, expert.")
        if self.compensate != "none" and not self.true_sequential:
            raise CameraError(
                "compensate=expert runs the quantised gate and up: set true_sequential=true."
            )
        if self.true_sequential and self.weighted_hessian:
            raise CameraError(
                "true_sequential keeps inputs without their routing weights: set "
                "weighted_hessian=false."
            )
        self.solver(GROUP_SIZE)  # refuses its own settings
        if self.bits is None:
            return
        least, most = self.reachable(budget)
        if not least <= self.bits * (1 + 1e-9) or self.bits > most * (1 + CLOSE):
            raise CameraError(
                f"bits={self.bits} can't be met: with these settings this model can store between "
                f"{least:.4g} and {most:.4g} bits per weight, scales included; change bits, "
                "group_bits or group_size."
            )

    def solver(self, group_size: int | None) -> GPTQ:
        """The solver with this method's settings; scales are what 16 bits can store."""
        return GPTQ(
            group_size=group_size,
            sym=self.sym,
            act_order=self.act_order,
            static_groups=self.static_groups,
            percdamp=self.damping,
            fallback=self.fallback,
            min_tokens=self.min_tokens,
            clip=CLIPS[self.clip],
            scale_dtype=torch.float16,
        )

    @property
    def scattered(self) -> bool:
        """Whether the columns of a scale group aren't neighbours, so that orders are stored."""
        return self.act_order and not self.static_groups

    def holds(self, budget: Budget) -> int:
        hidden, most = budget.hidden, 0
        for pool in budget.layers.values():
            solving = len(pool.widths) * solving_bytes(hidden, max(pool.widths))
            seen = hessian_bytes(hidden, pool.widths) if self.calibrates else 0
            most = max(most, seen + 5 * min(solving, SOLVE_BYTES) // 4)  # a quarter packs codes
        return most

    def observer(self, index: int, ffn: FeedForward) -> Any:
        if self.true_sequential and distributed.world() > 1:
            raise CameraError(
                "true_sequential runs experts again on inputs that one process keeps: start it "
                "without torchrun, or set true_sequential=false."
            )
        keep = self.sequential_tokens if self.true_sequential else 0
        return HessianObserver(ffn, weighted=self.weighted_hessian, keep=keep)

    def compress(
        self, index: int, ffn: FeedForward, seen: LayerStatistics | None, budget: Budget
    ) -> Outcome:
        bits, group_size = self.plan(index, ffn, seen, budget)
        solver, weights = self.solver(group_size), 3 * hidden_size(ffn) * sum(ffn.widths)
        hessians = seen if isinstance(seen, LayerHessians) else None
        how = Refit("expert") if self.compensate == "expert" else None
        forms, found = solve_layer(
            ffn, bits, solver, hessians, true_sequential=self.true_sequential, compensation=how
        )
        specs, plan = forms.values(), iter(bits)
        # of gate, up and down, which are equally large; what is removed counts as 0
        mean_bits = {
            group.path: [mean_of(next(plan)) for _ in group.widths] for group in ffn.groups
        }
        report = {
            "bits": {  # of the weights that were there, the removed ones included
                "target": self.bits,
                "stored": 8 * sum(map(spec_bytes, specs)) / weights if weights else 0.0,
                "raw": sum(map(spec_code_bits, specs)) / weights if weights else 0.0,
            },
            "group_size": group_size,
            "mean_bits": mean_bits,
            "experts": found,
        }
        return Outcome(forms, report=report)

    def enter(self, index: int, ffn: FeedForward) -> dict[str, dict[str, Any]]:
        size = {None: GROUP_SIZE, -1: None}.get(self.group_size, self.group_size)
        return round_outside(ffn, self.solver(size), self.attn_bits, self.router_bits)


def mean_of(expert: ExpertBits) -> float:
    """Bits per weight of one expert, without scales; 0 for one without micro-experts."""
    parts = [part.double().mean().item() for part in (expert.gate, expert.up, expert.down)]
    return sum(parts) / 3 if len(expert.down) else 0.0


def hidden_size(ffn: FeedForward) -> int:
    """Outputs of the layer's experts."""
    return ffn.groups[0].down(0).shape[0]


def footprints(
    budget: Budget, group_size: int | None, sym: bool, scattered: bool = False
) -> dict[int, Footprint]:
    """What every layer's pool takes, before any weight is read."""
    return {
        index: Footprint(budget.hidden, tuple(pool.widths), group_size, sym, scattered)
        for index, pool in budget.layers.items()
    }
