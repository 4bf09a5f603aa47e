"""Methods that remove the whole experts of lowest score.

Shapes: L layers, E routed experts of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from baselines.experts.base import ExpertPruning
from baselines.experts.use import UseSpec
from camera.calibration.observers import ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.method import LayerPlan, Pass, PassKind, Plan, Propagate, Seen
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from torch import Tensor

    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class ScoredExperts(ExpertPruning):
    """Removes the lowest-scored experts; of equals the first goes.

    `rank_scope` layer removes r of every layer, global the lowest of all layers together, by scores
    of the dense model. Layers then keep different numbers, at least one each, which only constants
    allow: without them a checkpoint has one number of experts.
    """

    rank_scope: Scope = "layer"

    def check(self, budget: Budget) -> None:
        self.require_choice("rank_scope", Scope)
        if self.rank_scope == "layer":
            super().check(budget)
            return
        self.require_constants(budget)
        if self.native:
            raise CameraError(
                "rank_scope=global keeps more experts in one layer than in another, and a native "
                "checkpoint has one number: set method.replaced_by=mean or fitted."
            )
        layers, experts = len(budget.layers), self.routing(budget).experts
        if not 1 <= self.removed_of_all(budget) <= layers * (experts - 1):
            raise CameraError(
                f"sparsity={self.sparsity} of '{self.sparsity_of}' isn't 1 to "
                f"{layers * (experts - 1)} of the {layers * experts} experts: each is "
                f"{self.share_of_one(budget):.4f} of it."
            )

    def share_left(self, budget: Budget) -> float:
        return super().share_left(budget) if self.rank_scope == "layer" else 1.0

    def removed_of_all(self, budget: Budget) -> int:
        """How many experts of all layers together go."""
        return math.floor(self.sparsity / self.share_of_one(budget) + 1e-9)

    def expert_scores(self, seen: LayerStatistics) -> Tensor:
        """The score [E] of a layer's routed experts."""
        raise NotImplementedError

    def observer(self) -> ObserverSpec:
        return UseSpec()

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        if self.rank_scope == "layer":
            return super().passes(budget, propagate)
        ranking = self.observer()
        first = PassKind.WEIGHTS if ranking.reads == "weights" else PassKind.DENSE
        last = Pass(PassKind.COMPRESSED, self.outputs(), feed=propagate)
        return (Pass(first, ranking), last)

    def plan(self, seen: Seen, budget: Budget) -> Plan:
        """With rank_scope=global the experts to remove of each layer, in what layers share."""
        plan = super().plan(seen, budget)
        if self.rank_scope == "layer":
            return plan
        import torch

        (statistics,) = seen.values()
        score_LE = torch.stack([self.expert_scores(statistics[i]) for i in budget.layers])
        ranked_LE = score_LE.clone()
        for ranked_E, index in zip(ranked_LE, budget.layers, strict=True):
            ranked_E[[*self.spared(index, budget), int(ranked_E.argmax())]] = math.inf
        ranked_N, count = ranked_LE.flatten(), self.removed_of_all(budget)
        lowest = torch.argsort(ranked_N, stable=True)[:count]
        if ranked_N[lowest].isinf().any():
            raise CameraError(
                f"sparsity={self.sparsity} removes {count} experts, and only "
                f"{int(ranked_N.isfinite().sum())} are left beside super experts and one of each "
                "layer: use a smaller sparsity, or method.spare_super_experts=false."
            )
        keep_N = torch.ones(len(ranked_N), dtype=torch.bool).index_fill(0, lowest, False)
        rows = zip(budget.layers, keep_N.view_as(score_LE), score_LE, strict=True)
        experts = {
            str(i): {"keep": keep_E.tolist(), "score": score_E.tolist()}
            for i, keep_E, score_E in rows
        }
        return replace(plan, shared={"experts": experts})

    def plan_layer(
        self, index: int, ffn: FeedForward, seen: LayerStatistics, budget: Budget, plan: Plan
    ) -> LayerPlan:
        import torch

        from baselines.experts.subset_search import keep_best

        if self.rank_scope == "global":
            decided = plan.shared["experts"][str(index)]
            return self.decided(torch.tensor(decided["keep"]), seen, {"score": decided["score"]})
        score_E = self.expert_scores(getattr(seen, "ranking", seen))
        step, _ = self.steps(self.routing(budget))
        ranked_E = score_E.index_fill(0, torch.tensor(self.spared(index, budget)).long(), math.inf)
        keep_E = keep_best(ranked_E, self.removed(budget), step)
        self.require_spared(index, keep_E, budget)
        return self.decided(keep_E, seen, {"score": score_E.tolist()})
