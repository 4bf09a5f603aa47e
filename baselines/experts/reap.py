"""REAP: removes the experts of lowest router-weighted activation.

https://arxiv.org/abs/2510.13999

Shapes: E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from baselines.experts.scored import ScoredExperts
from baselines.experts.use import ExpertUse, UseSpec

if TYPE_CHECKING:
    from torch import Tensor

    from camera.moe.budget import Budget

ReapScore = Literal["reap", "weighted_ean_sum", "ean_sum", "ean_mean", "weighted_frequency"]
RoutingWeights = Literal["model", "softmax"]


@dataclass(frozen=True)
class Reap(ScoredExperts):
    """Router-weighted expert activation pruning.

    S_e = mean over the tokens routed to e of g_e(x) * ||f_e(x)||_2, f_e the expert's output before
    its routing weight g_e; 0 for an expert no token reached. Source: REAP (ICLR 2026,
    arXiv 2510.13999).

    `routing_weights` model takes g as the model applies it; softmax is the reference's for a config
    without norm_topk_prob (Mixtral): the softmax over all logits, not renormalised. Other `score`s
    of the same pass: weighted_ean_sum = sum of g * ||f||, ean_sum and ean_mean = sum and mean of
    ||f||, weighted_frequency = sum of g.

    The reference is one-shot: that is the framework's propagate=dense. With propagate=compressed,
    its default for all methods, a layer is scored on the output of the pruned layers before it.
    """

    name: ClassVar[str] = "reap"

    score: ReapScore = "reap"
    routing_weights: RoutingWeights = "model"

    def check(self, budget: Budget) -> None:
        self.require_choice("score", ReapScore)
        self.require_choice("routing_weights", RoutingWeights)
        super().check(budget)

    def observer(self) -> UseSpec:
        return UseSpec(softmax=self.routing_weights == "softmax")

    def expert_scores(self, seen: ExpertUse) -> Tensor:
        sums = {
            "reap": seen.gated_norm_E,
            "weighted_ean_sum": seen.gated_norm_E,
            "ean_sum": seen.norm_E,
            "ean_mean": seen.norm_E,
            "weighted_frequency": seen.gate_E,
        }
        mean = self.score in ("reap", "ean_mean")
        tokens_E = seen.routed_tokens().clamp(min=1) if mean else 1
        return sums[self.score] / tokens_E
