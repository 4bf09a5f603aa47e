"""Which micro-experts may be removed: not those of spared experts, nor what a layer's floor holds.

Shapes: N micro-experts of some layers' pools, one after the other (shared expert first).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from camera.moe.pool import least_width
from camera.pruning.ranking import below_floor
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from camera.moe.budget import Budget
    from camera.moe.pool import LayerPool

log = logging.getLogger("camera")


def removable(
    pools: Mapping[int, LayerPool],
    scores: Sequence[torch.Tensor],
    *,
    routed_only: bool,
    layer_floor: float,
    spare_super_experts: bool,
) -> torch.Tensor | None:
    """bool [N]: which micro-experts of these layers may go, ranked by scores [N] each; None: all.

    `layer_floor` is the share of a layer's pool that stays whatever the ranking says.
    """
    widths = torch.tensor([width for pool in pools.values() for width in pool.widths])
    reasons = []
    if routed_only:
        routed_E = torch.tensor([routed for pool in pools.values() for routed in pool.routed])
        reasons.append(routed_E.repeat_interleave(widths))
    if layer_floor:
        reasons.append(torch.cat([below_floor(score_N, layer_floor) for score_N in scores]))
    if spare_super_experts and any(pool.super_experts for pool in pools.values()):
        free_E = [
            e not in pool.super_experts for pool in pools.values() for e in range(len(pool.widths))
        ]
        reasons.append(torch.tensor(free_E).repeat_interleave(widths))
    return torch.stack(reasons).all(0) if reasons else None


def require_enough(
    removable_N: torch.Tensor | None,
    pools: Mapping[int, LayerPool],
    remove: int,
    min_width: int,
    multiple: int,
    *,
    sparsity: float,
) -> None:
    """CameraError where so many can't go without those of a super expert."""
    told = ", ".join(f"{e} of layer {i}" for i, p in pools.items() for e in p.super_experts)
    if not told:
        return
    widths = [width for pool in pools.values() for width in pool.widths]
    kept = [least_width(width, min_width, multiple) for width in widths]
    parts = zip(removable_N.split(widths), kept, strict=True)
    rest = sum(max(int(part.sum()) - stay, 0) for part, stay in parts)
    if remove > rest:
        raise CameraError(
            f"sparsity={sparsity} removes {remove} micro-experts, and only {rest} are "
            f"left beside the super experts (expert {told}): use a smaller sparsity, or "
            "method.spare_super_experts=false."
        )


def warn_of_cut_super_experts(layers: Sequence[int], budget: Budget) -> None:
    """One width for all experts cuts super experts too: a line of the log for each layer."""
    for index in layers:
        if found := budget.layers[index].super_experts:
            log.warning(
                "layer %d: expert_widths=uniform cuts super expert %s like all others",
                index,
                ", ".join(map(str, found)),
            )
