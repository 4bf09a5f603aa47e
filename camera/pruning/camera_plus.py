"""Camera-Plus: layer budgets from trial pruning, then a least-squares refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from camera.compensation.settings import Scope, Target
from camera.method import RankScope
from camera.pruning.micro_experts import MicroExpertPruning

if TYPE_CHECKING:
    from camera.calibration.scores.base import Score


@dataclass(frozen=True)
class CameraPlus(MicroExpertPruning):
    """Trial pruning sets each layer's count, a score ranks within the layer, a refit compensates.

    `score` is a name of `camera.calibration.scores` (energy, hidden_share, projection, fisher,
    product, residual), `alpha` of energy and hidden_share, `normalize` of fisher and product.
    Gradients, where the score needs them, take one pass back through the layers.
    """

    name: ClassVar[str] = "camera_plus"

    score: str = "fisher"
    alpha: float = 0.0
    normalize: Literal["routed", "all"] = "routed"
    rank_scope: RankScope = "measured"
    compensate: Literal["none", Scope] = "layer"
    target: Target = "dense"

    def ranked_by(self) -> Score:
        from camera.calibration.scores.base import score_of

        return score_of(self)
