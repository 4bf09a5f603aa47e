"""Camera-Plus: one ranking of all layers by what the loss loses, then a least-squares refit."""

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
    """A score of the loss ranks all layers together, and a refit compensates for what goes.

    `score` is a name of `camera.calibration.scores` (energy, hidden_share, projection, fisher,
    product, residual), `alpha` of energy and hidden_share, `normalize` of fisher and product.
    Gradients, where the score needs them, take one pass back through the layers.
    """

    name: ClassVar[str] = "camera_plus"

    score: str = "fisher"
    alpha: float = 0.0
    normalize: Literal["routed", "all"] = "all"
    rank_scope: RankScope = "global"
    compensate: Literal["none", Scope] = "layer"
    target: Target = "between"

    def ranked_by(self) -> Score:
        from camera.calibration.scores.base import score_of

        return score_of(self)
