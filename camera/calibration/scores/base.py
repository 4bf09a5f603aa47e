"""The scores that micro-experts can be ranked by, under the names that settings have for them.

energy: Camera's, [(1 - alpha) |phi|_2^2 + alpha |phi|_inf^2] |w_down|^2.
relative: energy as a share of the hidden states it is added to, token by token: layers compare.
fisher: sum over tokens of (phi * dloss/dphi)^2, the Fisher information of scaling a micro-expert.
product: HEAPr's, which multiplies the two factors' means.
residual: what of its energy the other micro-experts of its expert can't stand in for.

Shapes: N micro-experts of a layer's pool.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from camera.calibration.scores.energy import EnergyObserver
from camera.calibration.scores.gradient import SensitivityObserver
from camera.calibration.scores.hidden_share import ShareObserver
from camera.calibration.scores.residual import GramObserver, gram_bytes
from camera.calibration.statistics import LayerStatistics
from camera.moe.budget import Budget
from camera.moe.feed_forward import FeedForward
from camera.runtime.errors import CameraError

Name = Literal["energy", "hidden_share", "fisher", "product", "residual"]
SCORES = get_args(Name)
OBSERVERS = {
    "energy": EnergyObserver,
    "relative": ShareObserver,
    "sensitivity": SensitivityObserver,
    "grams": GramObserver,
}


@dataclass(frozen=True)
class Score:
    """A score by its name; `alpha` is of energy and relative, `normalize` of fisher and
    product: routed takes means over an expert's own tokens, all sums over the calibration set."""

    name: Name
    alpha: float = 0.0
    normalize: Literal["routed", "all"] = "routed"

    def __post_init__(self) -> None:
        if self.name not in SCORES:
            raise CameraError(f"method.score={self.name} is none of {', '.join(SCORES)}.")
        if self.normalize not in ("routed", "all"):
            raise CameraError(f"method.normalize={self.normalize} is none of routed, all.")
        if not 0 <= self.alpha <= 1:
            raise CameraError(f"alpha={self.alpha} must lie between 0 and 1.")

    @property
    def backward(self) -> bool:
        """Whether it needs gradients."""
        return self.name in ("fisher", "product")

    @property
    def kind(self) -> str:
        """What is seen of a layer for it."""
        kinds = {"fisher": "sensitivity", "product": "sensitivity", "residual": "grams"}
        kinds["hidden_share"] = "relative"
        return kinds.get(self.name, self.name)

    def holds(self, widths: list[int]) -> int:
        """Bytes of what is seen of experts of these widths, where that is more than vectors."""
        return gram_bytes(widths) if self.name == "residual" else 0

    def observer(self, ffn: FeedForward) -> Any:
        """What sees it."""
        return OBSERVERS[self.kind](ffn)

    def of(self, seen: LayerStatistics) -> torch.Tensor:
        """fp64 [N], the lowest being the first to go."""
        if self.name in ("energy", "hidden_share"):
            return seen.energy(self.alpha)
        if self.name == "residual":
            return seen.residual_N
        return (seen.joint if self.name == "fisher" else seen.product)(self.normalize)


class Scored:
    """A method that ranks micro-experts by one of these: what it needs, and what it makes of it."""

    @property
    def ranked_by(self) -> Score:
        """The score, by the method's settings; CameraError for what it can't be."""
        raise NotImplementedError

    @property
    def backward(self) -> bool:
        return self.ranked_by.backward

    def check(self, budget: Budget) -> None:
        self.ranked_by  # noqa: B018 (refuses)
        super().check(budget)

    def holds(self, budget: Budget) -> int:
        pools = budget.layers.values()
        seen = max((self.ranked_by.holds(pool.widths) for pool in pools), default=0)
        return max(seen, super().holds(budget))

    def statistics_key(self) -> dict[str, Any]:
        return {"kind": self.ranked_by.kind}

    def observer(self, index: int, ffn: FeedForward) -> Any:
        return self.ranked_by.observer(ffn)

    def scores(self, index: int, seen: LayerStatistics, micro_experts: int) -> torch.Tensor:
        return self.ranked_by.of(seen)
