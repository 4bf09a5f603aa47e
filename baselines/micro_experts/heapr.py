"""HEAPr: micro-experts ranked across layers by a second-order estimate of the loss they'd cost."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from camera.calibration.scores.base import Score, Scored
from camera.moe.budget import Budget
from camera.pruning.micro_experts import MicroExpertPruning, RankScope
from camera.runtime.errors import CameraError


@dataclass
class HEAPr(Scored, MicroExpertPruning):
    """HEAPr: one shot, from one forward and one backward pass; the lowest of all layers go.

    `score` product is the method's own, mean(h^2) * mean((dloss/dh)^2), and fisher the term that
    it factorises, mean((h * dloss/dh)^2). `normalize` routed takes means over an expert's own
    tokens, all sums over the calibration set. The reference prunes routed experts only:
    `sparsity_of` routed with `rank_scope` global; otherwise shared experts are ranked along.
    Source: HEAPr (ICLR 2026); its experts without a token go first, as here.
    """

    name: ClassVar[str] = "heapr"
    calibrates: ClassVar[bool] = True

    rank_scope: RankScope = "global"
    score: Literal["product", "fisher"] = "product"
    normalize: Literal["routed", "all"] = "routed"

    def check(self, budget: Budget) -> None:
        if self.score not in ("product", "fisher"):
            raise CameraError(f"method.score={self.score} is none of product, fisher.")
        super().check(budget)

    @property
    def ranked_by(self) -> Score:
        return Score(self.score, normalize=self.normalize)
