"""HEAPr: pruning by a second-order estimate of the loss increase, ranked over all layers.

https://arxiv.org/abs/2509.22299
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from camera.method import RankScope
from camera.pruning.micro_experts import MicroExpertPruning
from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from camera.calibration.scores.base import Score
    from camera.moe.budget import Budget


@dataclass(frozen=True)
class HEAPr(MicroExpertPruning):
    """HEAPr: one forward and one backward pass; the lowest of all layers are pruned.

    `score` product is the method's own, mean(h^2) * mean((dloss/dh)^2), and fisher the term that it
    factorises, mean((h * dloss/dh)^2). `normalize` all takes sums over the calibration set, routed
    means over an expert's own tokens. The reference is `normalize` routed, `sparsity_of` routed and
    `rank_scope` global: it ranks no shared expert, beside which means make rarely used experts
    too dear. Source: HEAPr (ICLR 2026, arXiv 2509.22299); experts without a token are pruned first,
    as there.
    """

    name: ClassVar[str] = "heapr"

    rank_scope: RankScope = "global"
    score: Literal["product", "fisher"] = "product"
    normalize: Literal["routed", "all"] = "all"

    def check(self, budget: Budget) -> None:
        if self.score not in ("product", "fisher"):
            raise CameraError(f"method.score={self.score} is none of product, fisher.")
        super().check(budget)

    def ranked_by(self) -> Score:
        from camera.calibration.scores.base import score_of

        return score_of(self)
