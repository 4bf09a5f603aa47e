"""Pruning of micro-experts by a score: the base of Camera-P, Camera-Plus and their controls.

Shapes: N micro-experts of a layer's pool (shared expert first, then routed experts).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from camera.compensation.settings import CompensationSettings, Scope, Target, TokenWeights
from camera.method import (
    Applied,
    LayerPlan,
    Method,
    Pass,
    PassKind,
    Plan,
    Propagate,
    RankScope,
    Seen,
)
from camera.moe.budget import SparsityOf, to_remove
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from torch import Tensor

    from camera.calibration.scores.base import Score
    from camera.calibration.statistics import LayerStatistics
    from camera.calibration.trials import TrialMasks
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.pruning.plan import KeptMicroExperts
    from camera.pruning.uniform import UniformWidths

ExpertWidths = Literal["ragged", "uniform"]


@dataclass(frozen=True)
class MicroExpertPruning(Method):
    """Removes the n = int(N * ratio) lowest-scored micro-experts, of every layer's pool or of all.

    The ratio is solved from `sparsity` of `sparsity_of` (moe | model | routed; with `routed` the
    shared experts are left alone). `rank_scope` layer gives every layer the same ratio, global
    ranks all layers together, by scores of the dense model, measured sets each layer's count by
    trial pruning (`camera.calibration.trials`). `expert_widths` ragged lets every expert keep as
    many as rank; uniform gives all routed experts of the model one width, and the shared ones one,
    so that the checkpoint is native: serving engines take it. With rank_scope layer both kinds then
    lose the same share; with global those widths are taken that lose the least score over all
    layers. `width_multiple` rounds each expert's kept width for kernels, `min_width` keeps every
    expert at least that wide, `layer_floor` every layer's pool. `spare_super_experts` keeps those
    whole that were found (`camera.calibration.experts.super_experts`). `compensate` and what
    follows it: see `camera.compensation.settings`.
    """

    slices: ClassVar[bool] = True
    plan_kind: ClassVar[str] = "micro_experts"

    sparsity: float
    sparsity_of: SparsityOf = "moe"
    rank_scope: RankScope = "layer"
    expert_widths: ExpertWidths = "ragged"
    width_multiple: int = 1
    min_width: int = 0
    layer_floor: float = 0.0
    spare_super_experts: bool = True
    compensate: Literal["none", Scope] = "none"
    target: Target = "layer"
    token_weights: TokenWeights = "relative"
    ridges: Sequence[float] = CompensationSettings.ridges
    sweeps: int = CompensationSettings.sweeps
    held_out: float = CompensationSettings.held_out

    @abstractmethod
    def ranked_by(self) -> Score:
        """The score that ranks micro-experts; CameraError for settings that it can't have."""

    @property
    def compensation(self) -> CompensationSettings | None:
        if self.compensate == "none":
            return None
        fit = self.ridges, self.sweeps, self.held_out
        return CompensationSettings(self.compensate, self.target, self.token_weights, *fit)

    @property
    def reads_text(self) -> bool:
        return True

    def check(self, budget: Budget) -> None:
        if self.width_multiple < 1 or self.min_width < 0:
            raise CameraError(
                f"width_multiple={self.width_multiple} must be at least 1 and "
                f"min_width={self.min_width} at least 0."
            )
        if self.rank_scope not in get_args(RankScope):
            raise CameraError(
                f"rank_scope={self.rank_scope} is none of {', '.join(get_args(RankScope))}."
            )
        spec = self.ranked_by().observer()
        if self.rank_scope == "measured" and (spec is None or spec.reads == "weights"):
            raise CameraError(
                f"rank_scope=measured prunes on trial over calibration text, which method "
                f"{self.name} doesn't read: use rank_scope=global or layer."
            )
        if self.compensation:
            self.compensation.check(budget.model_type)
        if self.expert_widths not in get_args(ExpertWidths):
            raise CameraError(f"expert_widths={self.expert_widths} is none of ragged, uniform.")
        if self.native:
            from camera.pruning.uniform import refuse_other_ranking

            refuse_other_ranking(self.rank_scope, self.layer_floor)
            self.uniform(budget)
        ratio = self._ratio(budget)
        if not 0 <= self.layer_floor <= 1 - ratio:
            raise CameraError(
                f"layer_floor={self.layer_floor} must lie between 0 and the {1 - ratio:.3f} of all "
                "micro-experts that stay."
            )

    @property
    def native(self) -> bool:
        return self.expert_widths == "uniform"

    def uniform(self, budget: Budget) -> list[UniformWidths]:
        """The widths that all routed experts and all shared ones may have."""
        from camera.pruning.uniform import uniform_choices, uniform_widths

        asked = (budget, self.sparsity, self.sparsity_of, self.width_multiple, self.min_width)
        return [uniform_widths(*asked)] if self.rank_scope == "layer" else uniform_choices(*asked)

    def native_config(self, config: Any, budget: Budget, plan: Plan) -> dict[str, Any]:
        from camera.pruning.uniform import UniformWidths

        return UniformWidths.left(budget, plan.layers).config(budget.model_type)

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        spec, refits = self.ranked_by().observer(), self.compensate != "none"
        last = Pass(PassKind.COMPRESSED, tokens=refits)
        if spec is None:
            return (last,)
        if spec.reads == "weights":
            if self.rank_scope == "layer":
                return (replace(last, observer=spec),)
            return (Pass(PassKind.WEIGHTS, spec), last)
        if spec.reads == "activations" and self.rank_scope == "layer" and propagate == "compressed":
            return (replace(last, observer=spec, tokens=True),)
        first = PassKind.BACKWARD if spec.reads == "gradients" else PassKind.DENSE
        if self.rank_scope == "measured":
            return (Pass(first, spec), Pass(PassKind.TRIAL, trials=self.trials), last)
        return (Pass(first, spec), last)

    def trials(self, seen: Seen, budget: Budget) -> TrialMasks:
        """Masks of the trials of every layer, by what was seen."""
        from camera.calibration.trials import TRIAL_FRACTIONS

        statistics, found = _scored(seen), {}
        for i in budget.layers:
            pool = budget.layers[i]
            spared = self.spare_super_experts and not self.native
            free = pool.outside_super_experts() if spared else pool.micro_experts
            whole = self._counted(budget, [i])
            counts = [min(to_remove(whole, share), free) for share in TRIAL_FRACTIONS]
            found[i] = [self.masks(statistics, budget, [i], count)[i] for count in counts]
        return found

    def plan(self, seen: Seen, budget: Budget) -> Plan:
        plan, layers = super().plan(seen, budget), list(budget.layers)
        if self.rank_scope == "global":
            masks = self.masks(_scored(seen), budget, layers)
        elif self.rank_scope == "measured":
            masks = self._measured(seen, budget, layers)
        else:
            return plan
        return replace(plan, layers={i: _kept(masks[i], budget, i) for i in layers})

    def _measured(self, seen: Seen, budget: Budget, layers: list[int]) -> dict[int, Tensor]:
        from camera.pruning.allocation import allocate

        trials, masks = seen[PassKind.TRIAL], {}
        counts = allocate(
            [trials[i].removed_C.tolist() for i in layers],
            [trials[i].cost_C.tolist() for i in layers],
            to_remove(self._counted(budget, layers), self._ratio(budget)),
            self.width_multiple,
        )
        for i, count in zip(layers, counts, strict=True):
            masks |= self.masks(_scored(seen), budget, [i], count)
        return masks

    def plan_layer(
        self,
        index: int,
        ffn: FeedForward,
        seen: LayerStatistics | None,
        budget: Budget,
        plan: Plan,
    ) -> LayerPlan:
        statistics = {} if seen is None else {index: seen}
        return _kept(self.masks(statistics, budget, [index])[index], budget, index)

    def apply(
        self, index: int, ffn: FeedForward, plan: LayerPlan, seen: LayerStatistics | None
    ) -> Applied:
        from camera.moe.pool import rows_of_mask
        from camera.pruning.slicing import slice_layer

        if plan.widths != ffn.widths:
            raise CameraError(
                f"the plan of layer {index} was made for experts of other widths: apply it to the "
                "model that it was made for."
            )
        kept = rows_of_mask(ffn, plan.keep_N)
        return Applied(slice_layer(ffn, kept), kept)

    def masks(
        self,
        statistics: Mapping[int, LayerStatistics],
        budget: Budget,
        layers: list[int],
        remove: int | None = None,
    ) -> dict[int, Tensor]:
        """bool [N] of each of these layers, ranked together: which micro-experts stay.

        So many are removed as `remove` says, by default the asked sparsity of them.
        """
        import torch

        from camera.pruning.candidates import (
            removable,
            require_enough,
            warn_of_cut_super_experts,
        )
        from camera.pruning.ranking import keep_highest
        from camera.pruning.uniform import keep_uniform, least_loss

        score = self.ranked_by()
        pools = {i: budget.layers[i] for i in layers}
        sizes = [pool.micro_experts for pool in pools.values()]
        pairs = zip(layers, sizes, strict=True)
        scores = [score.of_layer(i, statistics.get(i), size) for i, size in pairs]
        if self.native:
            if self.spare_super_experts:
                warn_of_cut_super_experts(layers, budget)
            kept = least_loss(self.uniform(budget), scores, list(pools.values()))
            return {
                i: keep_uniform(score_N, pool.widths, kept.of(pool.routed))
                for score_N, (i, pool) in zip(scores, pools.items(), strict=True)
            }
        removable_N = removable(
            pools,
            scores,
            routed_only=self.sparsity_of == "routed",
            layer_floor=self.layer_floor,
            spare_super_experts=self.spare_super_experts,
        )
        if remove is None:
            remove = to_remove(self._counted(budget, layers), self._ratio(budget))
        widths = [width for pool in pools.values() for width in pool.widths]
        if self.spare_super_experts:
            floor = self.min_width, self.width_multiple
            require_enough(removable_N, pools, remove, *floor, sparsity=self.sparsity)
        keep_N = keep_highest(
            torch.cat(scores),
            widths,
            remove,
            width_multiple=self.width_multiple,
            min_width=self.min_width,
            candidates_N=removable_N,
        )
        return dict(zip(layers, keep_N.split(sizes), strict=True))

    def share_left(self, budget: Budget) -> float:
        if self.rank_scope != "layer":
            return 1.0
        removed = {
            i: to_remove(self._counted(budget, [i]), self._ratio(budget)) for i in budget.layers
        }
        return max(1 - count / budget.layers[i].micro_experts for i, count in removed.items())

    def _counted(self, budget: Budget, layers: list[int]) -> int:
        """Micro-experts of these layers that `sparsity` counts."""
        routed = self.sparsity_of == "routed"
        return sum(budget.layers[i].counted(only_routed=routed) for i in layers)

    def _ratio(self, budget: Budget) -> float:
        return budget.pool_ratio(
            self.sparsity, self.sparsity_of, self.min_width, self.width_multiple
        )


def _scored(seen: Seen) -> Mapping[int, LayerStatistics]:
    """What the score reads: the statistics of the pass before trials."""
    return next((seen[kind] for kind in seen if kind != PassKind.TRIAL), {})


def _kept(keep_N: Tensor, budget: Budget, index: int) -> KeptMicroExperts:
    from camera.pruning.plan import KeptMicroExperts

    return KeptMicroExperts(keep_N, list(budget.layers[index].widths))
