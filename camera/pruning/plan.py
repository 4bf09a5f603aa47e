"""Pruning plans: which micro-experts, or which experts, stay in a layer.

Shapes: N micro-experts of a layer's pool, E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from camera.method import LayerPlan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeptMicroExperts(LayerPlan):
    """keep_N: bool, in pool order; `widths` are those of the pool's experts before."""

    kind: ClassVar[str] = "micro_experts"

    keep_N: Tensor
    widths: list[int]

    def tensors(self) -> dict[str, Tensor]:
        return {"keep_N": self.keep_N}

    def facts(self) -> dict[str, Any]:
        return {"widths": self.widths}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> KeptMicroExperts:
        return cls(tensors["keep_N"], facts["widths"])

    @property
    def kept_widths(self) -> list[int]:
        """Width of every expert of the pool afterwards."""
        return [int(part.sum()) for part in self.keep_N.split(self.widths)]


@dataclass(frozen=True)
class KeptExperts(LayerPlan):
    """keep_E: bool, of the routed experts; `report` says how they were chosen."""

    kind: ClassVar[str] = "experts"

    keep_E: Tensor
    report: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return {"keep_E": self.keep_E}

    def facts(self) -> dict[str, Any]:
        return {"report": self.report}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> KeptExperts:
        return cls(tensors["keep_E"], facts["report"])

    @property
    def removed(self) -> list[int]:
        """The experts that don't stay."""
        return (~self.keep_E).nonzero().flatten().tolist()
