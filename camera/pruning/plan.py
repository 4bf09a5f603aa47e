"""Pruning plans: which micro-experts, or which experts, stay in a layer.

Shapes: N micro-experts of a layer's pool, E routed experts, R of them replaced, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from camera.method import LayerPlan

if TYPE_CHECKING:
    from torch import Tensor

    from camera.moe.pool import LayerPool


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

    def misfit(self, pool: LayerPool, hidden: int) -> str | None:
        if self.widths != pool.widths:
            return "was made for experts of other widths"
        return _misfit(self.keep_N, "keep_N", sum(pool.widths))

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

    def misfit(self, pool: LayerPool, hidden: int) -> str | None:
        wrong = _misfit(self.keep_E, "keep_E", sum(pool.routed))
        if wrong is None and pool.routing is not None and len(self.removed) > pool.routing.most:
            return f"removes {len(self.removed)} experts, and the router spares {pool.routing.most}"
        return wrong

    @property
    def removed(self) -> list[int]:
        """The experts that don't stay."""
        return _removed(self.keep_E)


@dataclass(frozen=True)
class ReplacedExperts(LayerPlan):
    """keep_E: bool, of the routed experts; constants_RH: what those that don't stay put out, in
    their order; `report` says how they were chosen."""

    kind: ClassVar[str] = "replaced_experts"

    keep_E: Tensor
    constants_RH: Tensor
    report: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return {"keep_E": self.keep_E, "constants_RH": self.constants_RH}

    def facts(self) -> dict[str, Any]:
        return {"report": self.report}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> ReplacedExperts:
        return cls(tensors["keep_E"], tensors["constants_RH"], facts["report"])

    def misfit(self, pool: LayerPool, hidden: int) -> str | None:
        if wrong := _misfit(self.keep_E, "keep_E", sum(pool.routed)):
            return wrong
        if not self.keep_E.any():
            return "keeps no expert"
        table, shape = self.constants_RH, (len(self.removed), hidden)
        if table.shape != shape or not table.is_floating_point() or not table.isfinite().all():
            return f"has constants_RH {list(table.shape)} instead of finite numbers {list(shape)}"
        return None

    @property
    def removed(self) -> list[int]:
        """The experts that don't stay."""
        return _removed(self.keep_E)


def _removed(keep_E: Tensor) -> list[int]:
    return (~keep_E).nonzero().flatten().tolist()


def _misfit(keep: Tensor, name: str, count: int) -> str | None:
    kind = str(keep.dtype).removeprefix("torch.")
    if kind == "bool" and keep.shape == (count,):
        return None
    return f"has {name} as {kind} {list(keep.shape)} instead of bool [{count}]"
