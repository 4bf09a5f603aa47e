"""D2-MoE: a layer's routed experts as one merged base and low-rank deltas.

https://arxiv.org/abs/2502.17298
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from camera.method import Applied, LayerPlan, Method, Pass, PassKind, Plan, Propagate
from camera.moe.budget import Sparsity, SparsityOf, to_remove
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from torch import Tensor

    from baselines.factorization.delta import DeltaSpec, DeltaStatistics
    from camera.calibration.statistics import LayerStatistics
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward
    from camera.moe.pool import LayerPool

Merge = Literal["fisher_freq", "fisher", "freq", "mean"]


@dataclass(frozen=True)
class LayerFactors(LayerPlan):
    """The tensors of `DeltaExperts`, and a report of how near they come."""

    kind: ClassVar[str] = "factors"

    factors: dict[str, Tensor]
    report: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        return self.factors

    def facts(self) -> dict[str, Any]:
        return {"report": self.report}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> LayerFactors:
        return cls(tensors, facts["report"])

    def misfit(self, pool: LayerPool, hidden: int) -> str | None:
        widths = [w for w, routed in zip(pool.widths, pool.routed, strict=True) if routed]
        if not widths or {"gate_up_proj", "down_right"} - self.factors.keys():
            return "holds no factors of routed experts"
        experts, width = len(widths), widths[0]
        rank, base = self.factors["down_right"].shape[1:2], len(self.factors["gate_up_proj"]) // 2
        asked = {
            "gate_up_proj": (2 * base, hidden),
            "gate_up_left": (experts, 2 * width, *rank),
            "gate_up_right": (experts, *(2 * r for r in rank), hidden),
            "down_proj": (hidden, base),
            "down_left": (experts, hidden, *rank),
            "down_right": (experts, *rank, width),
        }
        for name, shape in asked.items():
            found = self.factors.get(name)
            if found is None or tuple(found.shape) != shape or not found.is_floating_point():
                return f"has no '{name}' of the shape {list(shape)}"
        return None


@dataclass(frozen=True)
class D2Moe(Method):
    """D2-MoE: W_e = W_base + A_e B_e, the base a weighted mean, the deltas of one rank.

    `merge` says by what the mean is weighted (Fisher and selection counts, either, or neither);
    `pp_ratio` is the pruned share of the base's intermediate channels; the rank, the same in all
    projections, experts and layers, is the smallest that removes no more than `sparsity` of
    `sparsity_of` (moe | model | routed). `damping` of the Grams is in units of their mean diagonal.
    Statistics are those of the original model. Source: D2-MoE (ICML 2025, arXiv 2502.17298).
    """

    name: ClassVar[str] = "d2_moe"
    plan_kind: ClassVar[str] = LayerFactors.kind
    reads_text: ClassVar[bool] = True

    sparsity: float
    sparsity_of: SparsityOf = "moe"
    merge: Merge = "fisher_freq"
    pp_ratio: float = 0.0
    damping: float = 1e-6

    def check(self, budget: Budget) -> None:
        Sparsity(self.sparsity, self.sparsity_of)  # refuses
        if self.merge not in get_args(Merge):
            raise CameraError(f"merge={self.merge} is none of {', '.join(get_args(Merge))}.")
        if not 0 <= self.pp_ratio < 1:
            raise CameraError(f"pp_ratio={self.pp_ratio} must be at least 0 and below 1.")
        if self.damping < 0:
            raise CameraError(f"damping={self.damping} must not be negative.")
        self.rank(budget)

    def rank(self, budget: Budget) -> int:
        """The smallest rank that removes no more than the parameters asked for, by bisection.

        What a rank removes is counted from the tensors that a layer is stored as. Raises
        CameraError if even rank 1 keeps too much, naming the largest sparsity.
        """
        hidden, shapes = self._shapes(budget)
        whole = Sparsity(self.sparsity, self.sparsity_of).whole(budget)
        asked = self.sparsity * whole + 0.5  # half a parameter: floats

        def removed(rank: int) -> int:
            sizes = {shape: self._size(hidden, *shape, rank) for shape in set(shapes)}
            return budget.dense.routed - sum(sizes[shape] for shape in shapes)

        if removed(1) <= 0:
            raise CameraError(
                f"method=d2_moe can't make this {budget.model_type} model smaller: a merged base "
                "and deltas of rank 1 store more than its experts; choose another method."
            )
        if removed(1) < asked - 1:
            raise CameraError(
                f"sparsity={self.sparsity} of '{self.sparsity_of}' can't be reached: the largest "
                f"possible for this model with pp_ratio={self.pp_ratio} is "
                f"{floor(removed(1) / whole * 1e4) / 1e4}."
            )
        ranks = range(1, min(hidden, *(width for _, width in shapes)))
        return 1 + bisect_left(ranks, True, key=lambda rank: removed(rank) <= asked)

    def share_left(self, budget: Budget) -> float:
        return 1 - self.sparsity * Sparsity(self.sparsity, self.sparsity_of).whole(budget) / (
            budget.dense.moe
        )

    def observer(self, budget: Budget) -> DeltaSpec:
        """Sums of a layer, with gradients where they weigh the base."""
        from baselines.factorization.delta import DeltaSpec, FisherDeltaSpec
        from baselines.factorization.layer_factors import Factoring

        how = Factoring(self.merge, self.pp_ratio, self.rank(budget), self.damping)
        return FisherDeltaSpec(how) if self.merge.startswith("fisher") else DeltaSpec(how)

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        spec = self.observer(budget)
        kind = PassKind.BACKWARD if spec.reads == "gradients" else PassKind.DENSE
        return (Pass(kind, spec), Pass(PassKind.COMPRESSED, tokens=False))

    def plan_layer(
        self, index: int, ffn: FeedForward, seen: DeltaStatistics, budget: Budget, plan: Plan
    ) -> LayerFactors:
        errors = zip(("gate", "up", "down"), seen.error_P.tolist(), strict=True)
        unreached = sum(path == ffn.routed.path for path, _ in seen.unreached())
        report = {
            "rank": seen.down_left.shape[2],
            "base_width": seen.down_proj.shape[1],
            "output_error": dict(errors),
            "experts_without_tokens": unreached,
        }
        return LayerFactors(seen.factors(), report)

    def apply(
        self, index: int, ffn: FeedForward, plan: LayerFactors, seen: LayerStatistics | None
    ) -> Applied:
        from camera.checkpoint.formats.delta import DeltaExperts

        group = ffn.routed
        down, factors = group.down(0), plan.factors
        hidden, width = down.shape
        base_width, rank = factors["down_proj"].shape[1], factors["down_left"].shape[2]
        sizes = hidden, width, len(group.widths), base_width, rank
        module = DeltaExperts(*sizes, group.act_fn, "meta", down.dtype, group.layout)
        tensors = {n: t.to(down.device, down.dtype) for n, t in factors.items()}
        module.load_state_dict(tensors, assign=True)
        ffn.replace(group, module.requires_grad_(False))
        return Applied({group.path: module.spec()}, report=plan.report)

    def _size(self, hidden: int, experts: int, width: int, rank: int) -> int:
        from torch import nn

        from camera.checkpoint.formats.delta import DeltaExperts

        sizes = hidden, width, experts, base_width(width, self.pp_ratio), rank
        module = DeltaExperts(*sizes, nn.Identity(), "meta")
        return sum(parameter.numel() for parameter in module.parameters())

    def _shapes(self, budget: Budget) -> tuple[int, list[tuple[int, int]]]:
        """Hidden size, and (experts, width) of every layer's routed experts."""
        shapes = []
        for index, pool in budget.layers.items():
            pairs = zip(pool.widths, pool.routed, strict=True)
            widths = [width for width, routed in pairs if routed]
            if len(set(widths)) > 1:
                raise CameraError(
                    f"method=d2_moe needs experts of one width, and those of layer {index} have "
                    f"{min(widths)} to {max(widths)}: compress the original model."
                )
            if widths:
                shapes.append((len(widths), widths[0]))
        if not shapes:
            raise CameraError(
                f"method=d2_moe merges routed experts, and this {budget.model_type} model has "
                "none: choose another method, or a model with experts."
            )
        weights = 3 * sum(experts * width for experts, width in shapes)
        return budget.dense.routed // weights, shapes


def base_width(width: int, pp_ratio: float) -> int:
    """Intermediate channels of the base of experts of this width."""
    return width - to_remove(width, pp_ratio)
