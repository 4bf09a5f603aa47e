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
    factorises, mean((h * dloss/dh)^2). `normalize` routed takes means over an expert's own tokens,
    all sums over the calibration set. The reference prunes routed experts only: `sparsity_of`
    routed with `rank_scope` global; otherwise shared experts are ranked along. Source: HEAPr (ICLR
    2026, arXiv 2509.22299); experts without a token are pruned first, as there.
    """

    name: ClassVar[str] = "heapr"

    rank_scope: RankScope = "global"
    score: Literal["product", "fisher"] = "product"
    normalize: Literal["routed", "all"] = "routed"

    def check(self, budget: Budget) -> None:
        if self.score not in ("product", "fisher"):
            raise CameraError(f"method.score={self.score} is none of product, fisher.")
        super().check(budget)

    def ranked_by(self) -> Score:
        from camera.calibration.scores.base import score_of

        return score_of(self)
