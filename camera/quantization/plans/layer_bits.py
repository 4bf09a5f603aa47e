"""The bits of a layer, expert by expert: what a quantising method plans.

Shapes: N micro-experts of a pool, W those of an expert, E experts of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from camera.checkpoint.formats.packed.codes import MAX_BITS
from camera.method import LayerPlan
from camera.moe.pool import LayerPool


@dataclass(frozen=True)
class ExpertBits:
    """The bits of one expert's three matrices.

    down [W]: by column, i.e. micro-expert; 0 removes it. gate, up: by row [W] (`axis` rows) or by
    input channel [H] (columns). priority [W]: of micro-experts of equal bits the highest comes
    first; None leaves them in order.
    """

    axis: str
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    priority: torch.Tensor | None = None

    @classmethod
    def matched(cls, bits_W: torch.Tensor, priority_W: torch.Tensor | None = None) -> ExpertBits:
        """The same bits in gate, up and down of a micro-expert."""
        return cls("rows", bits_W, bits_W, bits_W, priority_W)

    def order(self) -> torch.Tensor:
        """The micro-experts that stay, by falling bits of down: int64 [M]."""
        first = torch.arange(len(self.down))
        if self.priority is not None:
            first = torch.argsort(self.priority, descending=True, stable=True)
        order = first[falling(self.down[first])]
        return order[self.down[order] > 0]

    @property
    def mean(self) -> float:
        """Bits per weight, without scales; 0 for an expert without micro-experts."""
        parts = [part.double().mean().item() for part in (self.gate, self.up, self.down)]
        return sum(parts) / 3 if len(self.down) else 0.0

    def folded(self) -> ExpertBits:
        """The same after the micro-experts were put in that order."""
        order = self.order()
        rows = order if self.axis == "rows" else slice(None)
        return ExpertBits(self.axis, self.gate[rows], self.up[rows], self.down[order])


def falling(bits: torch.Tensor) -> torch.Tensor:
    """The order that makes bits descend and moves nothing else."""
    return torch.argsort(bits, descending=True, stable=True)


@dataclass(frozen=True)
class LayerBits(LayerPlan):
    """Bits of every expert of a layer's pool, in pool order, and the group size (None: whole
    rows)."""

    kind: ClassVar[str] = "bits"

    experts: list[ExpertBits]
    group_size: int | None

    @classmethod
    def uniform(cls, widths: Sequence[int], bits: int, group_size: int | None) -> LayerBits:
        """The same bits for all weights of experts of these widths."""
        experts = [ExpertBits.matched(torch.full((width,), bits)) for width in widths]
        return cls(experts, group_size)

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {"gate": [], "up": [], "down": [], "priority": []}
        for expert in self.experts:
            for name, found in parts.items():
                if (part := getattr(expert, name)) is not None:
                    found.append(part)
        return {name: torch.cat(found) for name, found in parts.items() if found}

    def facts(self) -> dict[str, Any]:
        sizes = [[len(e.gate), len(e.down), e.priority is not None] for e in self.experts]
        return {"group_size": self.group_size, "axis": self.experts[0].axis, "sizes": sizes}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> LayerBits:
        across = [across for across, _, _ in facts["sizes"]]
        down = [width for _, width, _ in facts["sizes"]]
        ranked = [width for _, width, has in facts["sizes"] if has]
        priorities = iter(tensors["priority"].split(ranked) if ranked else ())
        parts = zip(
            tensors["gate"].split(across),
            tensors["up"].split(across),
            tensors["down"].split(down),
            facts["sizes"],
            strict=True,
        )
        experts = [
            ExpertBits(facts["axis"], gate, up, bits, next(priorities) if has else None)
            for gate, up, bits, (_, _, has) in parts
        ]
        return cls(experts, facts["group_size"])

    def misfit(self, pool: LayerPool, hidden: int) -> str | None:
        if [len(expert.down) for expert in self.experts] != pool.widths:
            return "was made for experts of other widths"
        if self.group_size is not None and not (
            type(self.group_size) is int and self.group_size > 0
        ):
            return f"has group_size={self.group_size!r}"
        for number, expert in enumerate(self.experts):
            across = len(expert.down) if expert.axis == "rows" else hidden
            for name in ("gate", "up", "down"):
                bits = getattr(expert, name)
                whole = not bits.is_floating_point() and bits.dtype != torch.bool
                if not whole or ((bits < 0) | (bits > MAX_BITS)).any():
                    return f"has bits of {name} of expert {number} that are not 0 to {MAX_BITS}"
                if name != "down" and len(bits) != across:
                    return f"has {len(bits)} bits of {name} of expert {number} instead of {across}"
        return None

    @property
    def mean_bits(self) -> list[float]:
        """Bits per weight of every expert, without scales."""
        return [expert.mean for expert in self.experts]
