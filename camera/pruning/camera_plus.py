"""Camera-Plus: each layer gives what it costs the model least, and least squares afterwards."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from camera.calibration.scores.base import Name, Score, Scored
from camera.compensation.settings import Scope, Target
from camera.pruning.micro_experts import MicroExpertPruning, RankScope


@dataclass
class CameraPlus(Scored, MicroExpertPruning):
    """Camera-Plus: of each layer the lowest scores go, as many as trial cuts say, and what stays
    makes up for them.

    `score`, `alpha` and `normalize` are explained in `camera.calibration.scores.base`, `rank_scope` in
    `camera.pruning.micro_experts`, `compensate` and `target` in `camera.compensation.least_squares`. Gradients, where the score needs
    them, take one pass back through the layers.

    What the parts are worth (docs/results.md): of Camera-P's rise in log-perplexity on SmolLM2-135M
    at 40 %, calibrated / other text, means of three seeds, with all layers ranked together
    (rank_scope=global) fisher alone leaves 1.07 / 1.02, refitted to the layer's own output 0.58 /
    0.55, to the dense model 0.52 / 0.53; with the same ratio in every layer 0.57 / 0.63, with
    budgets by trial cuts 0.49 / 0.50, and with four times as many tokens 0.45 / 0.48 (at 60 % 0.36
    / 0.45; where its FFNs are split into experts, one seed, 0.39 / 0.48 at 40 %). On a model that
    knows its calibration text by heart gradients say little and trial cuts mislead: there
    rank_scope=global keeps more of other text, and relative ranks better. A second cut, refitted
    gates and floors gained nothing.
    """

    name: ClassVar[str] = "camera_plus"
    calibrates: ClassVar[bool] = True

    score: Name = "fisher"
    alpha: float = 0.0
    normalize: Literal["routed", "all"] = "routed"
    rank_scope: RankScope = "measured"
    compensate: Literal["none", Scope] = "layer"
    target: Target = "dense"

    @property
    def ranked_by(self) -> Score:
        return Score(self.score, self.alpha, self.normalize)
