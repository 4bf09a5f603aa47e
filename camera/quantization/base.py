"""Base class of quantising methods: settings, the target, Hessians, the solver, the report.

A method plans bits (`plan_layer`); the rest is here and in camera/quantization/layer.py.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass, fields
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal

from camera.method import Applied, LayerPlan, Method, Pass, PassKind, Propagate, Spec
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from camera.calibration.observers import ObserverSpec
    from camera.calibration.statistics import LayerStatistics
    from camera.checkpoint.formats.packed.footprint import StoredBits
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.moe.pool import LayerShape
    from camera.quantization.plans.layer_bits import LayerBits
    from camera.quantization.quantizers.quantizer import Quantizer

GROUP_SIZE = 128
log = logging.getLogger("camera")


@dataclass(frozen=True)
class Quantization(Method):
    """Quantises all experts of a layer's pool by one solver; subclasses plan the bits.

    bits: the target, stored bits per weight on average over the quantised weights, scales and zeros
    included (null: given by the other settings). group_size: inputs that share a scale, -1 for the
    whole row, null to have it chosen. quantizer: a name of `camera.quantization.quantizers`. sym:
    no zeros. clip: range search (none, gptq, mc). scale_dtype: scales are stored in fp16; bfloat16
    rounds them to what this type holds too, as engines do that run a bf16 model. act_order,
    static_groups, damping, fallback, min_tokens: see `GPTQ`.
    weighted_hessian counts a token by its squared routing weight. true_sequential takes down's
    Hessian from the quantised gate and up, on the first `sequential_tokens` inputs of an expert;
    compensate expert refits down to these before it is quantised (see
    `camera.compensation.settings`). attn_bits, router_bits: round attention and router to nearest
    before the layer is run (null: left alone).
    """

    plan_kind: ClassVar[str] = "bits"
    tolerance: ClassVar[float] = 0.01  # share of the target by which a plan may stay below it
    calibrates: ClassVar[bool] = True

    bits: float | None = None
    quantizer: str = "gptq"
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
    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    attn_bits: int | None = None
    router_bits: int | None = None

    @property
    def reads_text(self) -> bool:
        return self.calibrates

    @abstractmethod
    def plan_layer(
        self,
        index: int,
        ffn: FeedForward,
        seen: LayerStatistics | None,
        budget: Budget,
        plan: object,
    ) -> LayerBits:
        """The bits of every expert of a layer's pool, and the group size."""

    @abstractmethod
    def reachable(self, budget: Budget) -> tuple[float, float]:
        """The least and the most stored bits that the settings can give this model."""

    def check(self, budget: Budget) -> None:
        from camera.quantization.quantizers.grids import CLIPS

        if self.bits is not None and not 0 < self.bits < inf:
            raise CameraError(f"bits={self.bits} must be a positive number of bits per weight.")
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
        self.quantizer_of(GROUP_SIZE)  # refuses its own settings
        if self.bits is None:
            return
        least, most = self.reachable(budget)
        if not least <= self.bits * (1 + 1e-9) or self.bits > most * (1 + self.tolerance):
            raise CameraError(
                f"bits={self.bits} can't be met: with these settings this model can store between "
                f"{least:.4g} and {most:.4g} bits per weight, scales included; change bits, "
                "group_bits or group_size."
            )

    def say_missed(self, where: str, stored: float, following: float) -> None:
        """Say that a plan stays below the target by more than `tolerance`, and what comes next."""
        log.warning(
            "bits=%s: %s stores %.4g bits per weight, and the next plan that these settings allow "
            "%.4g",
            self.bits,
            where,
            stored,
            following,
        )

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        if not self.calibrates:
            return (Pass(PassKind.COMPRESSED, tokens=False),)
        return (Pass(PassKind.COMPRESSED, self.observer(), feed=propagate),)

    def passes_of_plan(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        return self.passes(budget, propagate)[-1:]  # Hessians are needed again

    def observer(self) -> ObserverSpec:
        """The statistics that quantisation reads: Hessians."""
        from camera.calibration.hessians import HessianSpec

        keep = self.sequential_tokens if self.true_sequential else 0
        return HessianSpec(weighted=self.weighted_hessian, keep=keep)

    def quantizer_of(self, group_size: int | None) -> Quantizer:
        """The quantiser that `quantizer` names, with this method's settings of it; scales are what
        16 bits can store."""
        import torch

        from camera.quantization.quantizers.grids import CLIPS
        from camera.quantization.quantizers.quantizer import QUANTIZERS

        cls = QUANTIZERS[self.quantizer]
        settings = {
            "group_size": group_size,
            "sym": self.sym,
            "act_order": self.act_order,
            "static_groups": self.static_groups,
            "damping": self.damping,
            "fallback": self.fallback,
            "min_tokens": self.min_tokens,
            "clip": CLIPS[self.clip],
            "scale_dtype": getattr(torch, self.scale_dtype),
        }
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})

    @property
    def scattered(self) -> bool:
        """Whether the columns of a scale group aren't neighbours, so that orders are stored."""
        return self.act_order and not self.static_groups

    def resolved_group_size(self, default: int | None = GROUP_SIZE) -> int | None:
        """Inputs that share a scale: `default` for null, None for -1, the whole row."""
        return {None: default, -1: None}.get(self.group_size, self.group_size)

    def share_left(self, budget: Budget) -> float:
        if self.bits is None:
            return 1.0
        return min(1.0, self.bits * budget.dense.model / (8 * budget.dense.bytes))

    def apply_bytes(self, layer: LayerShape) -> int:
        from camera.quantization.layer import batch_bytes

        needs = self.calibrates and self.quantizer_of(None).needs_hessian
        pairs = zip(layer.pool.widths, layer.pool.routed, strict=True)
        modules = [[width] for width, routed in pairs if not routed]
        modules += [layer.routed_widths] if layer.routed_widths else []
        known = dict(card=layer.card, hessians=needs)
        solving = max(batch_bytes(layer.hidden, widths, **known) for widths in modules)
        return 5 * solving // 4  # a quarter packs codes

    def apply(
        self, index: int, ffn: FeedForward, plan: LayerPlan, seen: LayerStatistics | None
    ) -> Applied:
        from camera.calibration.hessians import HessianStatistics
        from camera.checkpoint.formats.packed.spec import spec_bytes, spec_code_bits
        from camera.compensation.settings import CompensationSettings
        from camera.quantization.layer import quantize_layer

        weights = 3 * hidden_size(ffn) * sum(ffn.widths)
        refit = CompensationSettings("expert") if self.compensate == "expert" else None
        forms, found = quantize_layer(
            ffn,
            plan.experts,
            self.quantizer_of(plan.group_size),
            seen if isinstance(seen, HessianStatistics) else None,
            true_sequential=self.true_sequential,
            compensation=refit,
        )
        specs, means = forms.values(), iter(plan.mean_bits)
        # of gate, up and down, which are equally large; what is removed counts as 0
        mean_bits = {group.path: [next(means) for _ in group.widths] for group in ffn.groups}
        report = {
            "bits": {  # of the weights that were there, the removed ones included
                "target": self.bits,
                "stored": 8 * sum(map(spec_bytes, specs)) / weights if weights else 0.0,
                "raw": sum(map(spec_code_bits, specs)) / weights if weights else 0.0,
            },
            "group_size": plan.group_size,
            "mean_bits": mean_bits,
            "experts": found,
        }
        return Applied(forms, report=report)

    def prepare_layer(self, index: int, ffn: FeedForward) -> dict[str, Spec]:
        from camera.quantization.outside_experts import round_outside

        quantizer = self.quantizer_of(self.resolved_group_size())
        return round_outside(ffn, quantizer, self.attn_bits, self.router_bits)


def hidden_size(ffn: FeedForward) -> int:
    """Outputs of the layer's experts."""
    return ffn.groups[0].down(0).shape[0]


def footprints(
    budget: Budget, group_size: int | None, sym: bool, scattered: bool = False
) -> dict[int, StoredBits]:
    """Stored bits of every layer's pool, before any weight is read."""
    from camera.checkpoint.formats.packed.footprint import StoredBits

    return {
        index: StoredBits(budget.hidden, tuple(pool.widths), group_size, sym, scattered)
        for index, pool in budget.layers.items()
    }
