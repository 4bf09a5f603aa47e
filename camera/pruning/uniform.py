"""One width for all routed experts of a model and one for its shared ones, as serving engines ask.

Shapes: N micro-experts of a layer's pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from camera.moe.families import family_of
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    import torch

    from camera.moe.budget import Budget, SparsityOf

TOLERANCE = 0.01  # how far the sparsity of whole multiples may be from the one asked for


@dataclass(frozen=True)
class UniformWidths:
    """Kept widths of routed experts and of the others (shared experts, or dense FFNs); 0: none."""

    routed: int
    shared: int

    def of(self, routed: Sequence[bool]) -> list[int]:
        """Width of every expert of a pool."""
        return [self.routed if is_routed else self.shared for is_routed in routed]

    def config(self, model_type: str) -> dict[str, int]:
        """The keys of config.json that hold these widths."""
        keys = family_of(model_type).keys
        if not self.routed:
            return {keys.dense_width: self.shared}
        found = {keys.width: self.routed}
        if self.shared and keys.shared_count is None:
            found[keys.shared_width] = self.shared
        return found


def uniform_widths(
    budget: Budget, sparsity: float, sparsity_of: SparsityOf, multiple: int, min_width: int
) -> UniformWidths:
    """The widths, multiples of `multiple`, whose sparsity is next to the one asked for.

    CameraError, naming the sparsities on both sides, where none lies within `TOLERANCE` of it; and
    for a model whose experts are of unequal widths already.
    """
    routed, shared = _width(budget, True), _width(budget, False)
    keys = family_of(budget.model_type).keys
    one_key = keys.shared_count is not None or keys.shared_width == keys.width
    tied = bool(routed and shared) and one_key
    if tied and sparsity_of == "routed":
        raise CameraError(
            f"expert_widths=uniform: a {budget.model_type} model has one width for routed and "
            "shared experts: use sparsity_of=moe."
        )
    ratio = budget.pool_ratio(sparsity, sparsity_of, min_width, multiple)
    first = routed or shared
    least = max(multiple, -(-min_width // multiple) * multiple)
    below = max(least, int((first * (1 - ratio) + 1e-9) // multiple) * multiple)
    choices = []
    for width in sorted({min(below, first), min(below + multiple, first)}):
        widths = UniformWidths(width if routed else 0, 0 if routed else width)
        if routed and shared and tied:
            widths = UniformWidths(width, shared // routed * width)
        elif routed and shared:
            kept = round(shared * (1 - ratio) / multiple) * multiple
            kept = shared if sparsity_of == "routed" else min(max(kept, least), shared)
            widths = UniformWidths(width, kept)
        choices.append((_sparsity(budget, widths, sparsity_of), widths))
    near, widths = min(choices, key=lambda choice: abs(choice[0] - sparsity))
    if abs(near - sparsity) > TOLERANCE:
        sides = " or ".join(f"{found:.4f} (width {w.routed or w.shared})" for found, w in choices)
        raise CameraError(
            f"sparsity={sparsity} of '{sparsity_of}' lies between the widths that are multiples of "
            f"width_multiple={multiple}: use sparsity={sides}, or a smaller width_multiple."
        )
    return widths


def keep_uniform(score_N: torch.Tensor, widths: Sequence[int], kept: Sequence[int]) -> torch.Tensor:
    """bool [N]: of every expert its `kept` highest-scored micro-experts; of equals the first goes
    first."""
    import torch

    keep_N = torch.ones(len(score_N), dtype=torch.bool)
    start = 0
    for width, stay in zip(widths, kept, strict=True):
        ascending = torch.argsort(score_N[start : start + width], stable=True)
        keep_N[start + ascending[: width - stay]] = False
        start += width
    return keep_N


def _width(budget: Budget, routed: bool) -> int:
    widths = {
        width
        for pool in budget.layers.values()
        for width, is_routed in zip(pool.widths, pool.routed, strict=True)
        if is_routed == routed
    }
    if len(widths) > 1:
        raise CameraError(
            f"expert_widths=uniform: the experts have widths from {min(widths)} to {max(widths)} "
            "already: begin with the original model."
        )
    return widths.pop() if widths else 0


def _sparsity(budget: Budget, widths: UniformWidths, sparsity_of: SparsityOf) -> float:
    """The share of the denominator's parameters that these widths remove."""
    removed = total = 0
    for pool in budget.layers.values():
        kept = widths.of(pool.routed)
        for width, stay, is_routed in zip(pool.widths, kept, pool.routed, strict=True):
            if is_routed or sparsity_of != "routed":
                removed, total = removed + width - stay, total + width
    whole: Any = getattr(budget.dense, sparsity_of)
    return removed / total * budget.prunable(sparsity_of) / whole
