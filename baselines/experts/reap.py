"""REAP: the experts whose weighted output is smallest go.

Shapes: E routed experts.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from baselines.experts.base import ExpertUse, ScoredExperts, UseObserver
from camera.moe.budget import Budget
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError

SCORES = ("reap", "weighted_ean_sum", "ean_sum", "ean_mean", "weighted_frequency")
ROUTING_WEIGHTS = ("model", "softmax")


@dataclass
class Reap(ScoredExperts):
    """Router-weighted expert activation pruning.

    S_e = mean over the tokens routed to e of g_e(x) * ||f_e(x)||_2, f_e the expert's output before
    its routing weight g_e; 0 for an expert no token reached. Source: REAP (ICLR 2026).

    `routing_weights` model takes g as the model applies it; softmax is the reference's for a config
    without norm_topk_prob (Mixtral): the softmax over all logits, not renormalised. Other `score`s
    of the same pass: weighted_ean_sum = sum of g * ||f||, ean_sum and ean_mean = sum and mean of
    ||f||, weighted_frequency = sum of g.

    The reference is one-shot: that is the framework's propagate=dense. With propagate=compressed,
    its default for all methods, a layer is scored on what the pruned layers before it put out.
    """

    name: ClassVar[str] = "reap"

    score: Literal["reap", "weighted_ean_sum", "ean_sum", "ean_mean", "weighted_frequency"] = "reap"
    routing_weights: Literal["model", "softmax"] = "model"

    def check(self, budget: Budget) -> None:
        for key, options in (("score", SCORES), ("routing_weights", ROUTING_WEIGHTS)):
            if getattr(self, key) not in options:
                raise CameraError(f"{key}={getattr(self, key)} is none of {', '.join(options)}.")
        super().check(budget)

    def statistics_key(self) -> dict[str, Any]:
        return super().statistics_key() | (
            {"gate": "softmax"} if self.routing_weights == "softmax" else {}
        )

    def observer(self, index: int, ffn: FeedForward) -> UseObserver:
        return UseObserver(ffn, softmax=self.routing_weights == "softmax")

    def scores(self, seen: ExpertUse) -> torch.Tensor:
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
