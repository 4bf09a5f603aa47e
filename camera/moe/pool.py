"""The pool of a layer: its micro-experts in order, and those that are kept.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts 0, 1, ...;
within an expert by row), E experts of the pool, T tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from camera.moe.feed_forward import FeedForward
    from camera.moe.routing import RouterConstraints

KeptRows = dict[str, list["torch.Tensor"]]
"""By module path and expert: the sorted rows of the micro-experts that stay."""


def least_width(width: int, min_width: int, multiple: int) -> int:
    """Micro-experts that an expert keeps in any case: whole blocks, as the ranking cuts them."""
    return min(width, -(-min(width, min_width) // multiple) * multiple)


@dataclass
class LayerPool:
    """Micro-experts of one layer that may be removed."""

    widths: list[int]  # of every expert, in pool order
    routed: list[bool]
    routing: RouterConstraints | None = None  # None where no whole experts can be removed
    super_experts: list[int] = field(default_factory=list)  # by number in the pool, once found

    @property
    def micro_experts(self) -> int:
        """N of the layer."""
        return sum(self.widths)

    def counted(self, *, only_routed: bool) -> int:
        """Micro-experts that a sparsity counts: all, or those of routed experts."""
        pairs = zip(self.widths, self.routed, strict=True)
        return sum(width for width, routed in pairs if routed or not only_routed)

    def outside_super_experts(self) -> int:
        """Micro-experts of all others."""
        return sum(w for e, w in enumerate(self.widths) if e not in self.super_experts)

    def removable(self, only_routed: bool, min_width: int, multiple: int) -> float:
        """Largest prunable share of the candidates."""
        pairs = zip(self.widths, self.routed, strict=True)
        widths = [width for width, routed in pairs if routed or not only_routed]
        kept = [least_width(width, min_width, multiple) for width in widths]
        return 1 - sum(kept) / sum(widths) if sum(widths) else 0.0


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer in a pass, for estimates: its pool, the model's H and K, T tokens.

    `card` is the memory of the accelerator that computes, in bytes; None for a CPU.
    """

    pool: LayerPool
    hidden: int
    top_k: int
    tokens: int
    itemsize: int  # bytes of a number in the dtype that is computed in
    card: int | None = None

    @property
    def routed_widths(self) -> list[int]:
        """Widths of the routed experts."""
        pairs = zip(self.pool.widths, self.pool.routed, strict=True)
        return [width for width, routed in pairs if routed]


class PoolIndex:
    """Places of a layer's experts in its pool."""

    def __init__(self, ffn: FeedForward):
        self.groups = {group.path: list(group.widths) for group in ffn.groups}
        self._experts: dict[tuple[str, int], int] = {}
        self._rows: dict[tuple[str, int], slice] = {}
        start = 0
        for path, widths in self.groups.items():
            for expert, width in enumerate(widths):
                self._experts[path, expert] = len(self._experts)
                self._rows[path, expert] = slice(start, start + width)
                start += width
        self.experts, self.micro_experts = len(self._experts), start

    def expert(self, path: str, expert: int) -> int:
        """Number of an expert in the pool, from 0."""
        return self._experts[path, expert]

    def rows(self, path: str, expert: int) -> slice:
        """Rows of an expert's micro-experts in the pool."""
        return self._rows[path, expert]


def rows_of_mask(ffn: FeedForward, keep_N: torch.Tensor) -> KeptRows:
    """Row indices per expert of a mask over the pool (bool, pool order)."""
    rows = iter(part.nonzero().squeeze(1) for part in keep_N.cpu().split(ffn.widths))
    return {group.path: [next(rows) for _ in group.widths] for group in ffn.groups}


def rows_on(rows: KeptRows, device: torch.device) -> KeptRows:
    """Row indices of a layer on a device, in one copy that nothing waits for."""
    import torch

    from camera.runtime.device.staging import on_device

    parts = [part for parts in rows.values() for part in parts]
    if all(part.device == device for part in parts):
        return rows
    moved = iter(on_device(torch.cat(parts), device).split([len(part) for part in parts]))
    return {path: [next(moved) for _ in parts] for path, parts in rows.items()}


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype of sums over tokens: fp64, fp32 on a device without it."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def layer_seed(seed: int, index: int) -> int:
    """Seed of what is drawn for one layer."""
    return seed * 100_003 + index
