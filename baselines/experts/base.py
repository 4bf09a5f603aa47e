"""Methods that remove whole routed experts, the same number in every layer, and their statistics.

Their result is a plain checkpoint of the model's own type with fewer experts. Shapes: E routed
experts of a layer, N tokens of one expert, H hidden, W width of one expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any, ClassVar

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.method import Applied, LayerPlan, Method, Pass, PassKind, Plan, Propagate
from camera.moe.budget import Sparsity, SparsityOf
from camera.moe.pool import PoolIndex, sum_dtype
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from camera.moe.budget import Budget
    from camera.moe.capture import ExpertCall
    from camera.moe.feed_forward import FeedForward
    from camera.moe.routing import RouterConstraints
    from camera.pruning.plan import KeptExperts


@dataclass(frozen=True)
class ExpertPruning(Method):
    """Removes r whole routed experts of every layer, with their rows of the router.

    r is the largest number (for a group-limited router: multiple of its groups) that doesn't
    exceed `sparsity` of `sparsity_of`: experts are whole, so what is realised is at most that, and
    less by less than one expert (of each group) per layer. Of `moe` and `routed` it is experts
    that count, of `model` their router rows too. Shared experts stay, and with
    `spare_super_experts` those that were found (`camera.calibration.experts.super_experts`).
    """

    plan_kind: ClassVar[str] = "experts"
    native: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    sparsity: float
    sparsity_of: SparsityOf = "moe"
    spare_super_experts: bool = True

    def check(self, budget: Budget) -> None:
        self.removed(budget)

    def removed(self, budget: Budget) -> int:
        """r of every layer; CameraError, naming the nearest possible sparsity, if there is none."""
        whole = Sparsity(self.sparsity, self.sparsity_of).whole(budget)
        routing = self.routing(budget)
        layers = len(budget.layers)
        one = budget.dense.routed // routing.experts + layers * routing.row * (
            self.sparsity_of == "model"
        )
        step = one * routing.groups / whole  # the share that the fewest experts possible make up
        steps, most = floor(self.sparsity / step + 1e-9), routing.most // routing.groups
        if 1 <= steps <= most:
            return steps * routing.groups
        if not most:
            raise CameraError(
                f"method {self.name}: a layer of this {budget.model_type} model has "
                f"{routing.experts} routed experts, none of which its top-{routing.top_k} router "
                "can spare."
            )
        end, number = ("smallest", 1) if steps < 1 else ("largest", most)
        groups = f" from {routing.groups} groups of equal size" if routing.groups > 1 else ""
        raise CameraError(
            f"sparsity={self.sparsity} of '{self.sparsity_of}' can't be met by removing whole "
            f"experts: the {end} possible for method {self.name} is "
            f"{ceil(number * step * 1e4) / 1e4} ({number * routing.groups} of {routing.experts} "
            f"experts per layer; the router chooses {routing.top_k}{groups})."
        )

    def spared(self, index: int, budget: Budget) -> list[int]:
        """The super experts of a layer that are to stay, by their number among the routed ones."""
        pool = budget.layers[index]
        shared = pool.routed.index(True)
        found = [expert - shared for expert in pool.super_experts if expert >= shared]
        return found if self.spare_super_experts else []

    def require_spared(self, index: int, keep_E: Tensor, budget: Budget) -> None:
        """CameraError where a super expert would have to go."""
        if gone := [expert for expert in self.spared(index, budget) if not keep_E[expert]]:
            told = ", ".join(map(str, gone))
            raise CameraError(
                f"sparsity={self.sparsity} leaves no room in layer {index} for its super experts "
                f"(expert {told}): use a smaller sparsity, or method.spare_super_experts=false."
            )

    def routing(self, budget: Budget) -> RouterConstraints:
        """What every layer's router asks for; CameraError where no whole experts can go."""
        if not any(any(pool.routed) for pool in budget.layers.values()):
            raise CameraError(
                f"method {self.name} removes whole routed experts and this {budget.model_type} "
                "model has none: use one that removes micro-experts (camera_p, heapr, magnitude)."
            )
        found = {pool.routing for pool in budget.layers.values()}
        if None in found:
            raise CameraError(
                f"method {self.name} removes whole experts of a model's native weights, and this "
                "one is already compressed: start from the original."
            )
        if len(found) > 1:
            raise CameraError(
                f"method {self.name} writes one number of experts for all layers, and this "
                f"{budget.model_type} model's layers differ."
            )
        return found.pop()

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        spec = self.observer()
        if propagate == "dense":
            return (Pass(PassKind.DENSE, spec), Pass(PassKind.COMPRESSED, tokens=False))
        return (Pass(PassKind.COMPRESSED, spec),)

    def observer(self) -> ObserverSpec:
        """What the method looks at in every layer."""
        raise NotImplementedError

    def apply(
        self, index: int, ffn: FeedForward, plan: KeptExperts, seen: LayerStatistics | None
    ) -> Applied:
        from camera.pruning.whole_experts import remove_experts

        remove_experts(ffn, plan.keep_E.nonzero().flatten().tolist())
        return Applied(report={"dropped": plan.removed, **plan.report})

    def native_config(self, config: Any, budget: Budget, plan: Plan) -> dict[str, Any]:
        from camera.pruning.whole_experts import smaller_config

        experts = self.routing(budget).experts
        return smaller_config(config, experts - self.removed(budget))


@dataclass
class ExpertUse(LayerStatistics):
    """How a layer's routed experts were used by the tokens routed to them.

    gate_E = sum of g_e(x), norm_E = sum of ||f_e(x)||_2, gated_norm_E = sum of their product (all
    fp64), f_e the expert's output before its routing weight g_e; tokens_E counts, over the whole
    pool (shared expert first).
    """

    kind: ClassVar[str] = "expert_use"
    reduced: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tokens_E", "gate_E", "norm_E", "gated_norm_E"), "sum"
    )
    tokens_E: torch.Tensor
    gate_E: torch.Tensor
    norm_E: torch.Tensor
    gated_norm_E: torch.Tensor

    def routed_tokens(self) -> Tensor:
        """tokens_E of the routed experts alone."""
        return self.tokens_E[-len(self.gate_E) :]


@dataclass(frozen=True)
class UseSpec(ObserverSpec):
    """Use of experts; `softmax` takes g from all logits instead of the model's weights."""

    statistics: ClassVar[type[ExpertUse]] = ExpertUse

    softmax: bool = False

    def build(self, index: int, ffn: FeedForward) -> UseObserver:
        return UseObserver(ffn, self.softmax)


class UseObserver(LayerObserver):
    """Gathers `ExpertUse`."""

    def __init__(self, ffn: FeedForward, softmax: bool = False):
        import torch

        self.ffn, self.softmax, self._index = ffn, softmax, PoolIndex(ffn)
        self._tokens = [0] * self._index.experts
        device = next(ffn.module.parameters()).device
        experts = len(ffn.routed.widths)
        self._sums_3E = torch.zeros(3, experts, dtype=sum_dtype(device), device=device)

    def __call__(self, call: ExpertCall) -> None:
        import torch

        group, x_NH, a_N = call.group, call.x_NH, call.a_N
        self._tokens[self._index.expert(group.path, call.expert)] += len(x_NH)
        if not group.routed:
            return
        if self.softmax:
            from camera.moe.routing import routed

            logits_NE = routed(self.ffn, x_NH)[0]
            a_N = logits_NE.float().softmax(-1)[:, call.expert]
        norm_N = group.project(call.expert, call.h_NW.to(x_NH.dtype)).float().norm(dim=-1)
        found = torch.stack((a_N.float(), norm_N, a_N.float() * norm_N))
        self._sums_3E[:, call.expert] += found.to(self._sums_3E.dtype).sum(1)

    def result(self) -> ExpertUse:
        """The statistics gathered so far, on the CPU."""
        import torch

        tokens_E = torch.tensor(self._tokens)
        return ExpertUse(self._index.groups, tokens_E, *self._sums_3E.cpu().double())


@dataclass(frozen=True)
class ScoredExperts(ExpertPruning):
    """Removes the lowest-scored experts of every layer; of equals the first goes."""

    def expert_scores(self, seen: ExpertUse) -> Tensor:
        """The score [E] of a layer's routed experts."""
        raise NotImplementedError

    def observer(self) -> UseSpec:
        return UseSpec()

    def plan_layer(
        self, index: int, ffn: FeedForward, seen: ExpertUse, budget: Budget, plan: Plan
    ) -> LayerPlan:
        import torch

        from baselines.experts.subset_search import keep_best
        from camera.pruning.plan import KeptExperts

        score_E, groups = self.expert_scores(seen), self.routing(budget).groups
        ranked_E = score_E.index_fill(0, torch.tensor(self.spared(index, budget)).long(), math.inf)
        keep_E = keep_best(ranked_E, self.removed(budget), groups)
        self.require_spared(index, keep_E, budget)
        return KeptExperts(keep_E, {"score": score_E.tolist()})
