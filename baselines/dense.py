"""The uncompressed model: the first row of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from camera.method import Applied, LayerPlan, Method, Pass, Propagate

if TYPE_CHECKING:
    from camera.calibration.statistics import LayerStatistics
    from camera.moe.budget import Budget
    from camera.moe.feed_forward import FeedForward


@dataclass(frozen=True)
class Dense(Method):
    """Nothing is compressed."""

    name: ClassVar[str] = "dense"
    compresses: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False

    def check(self, budget: Budget) -> None:
        """Any model will do."""

    def passes(self, budget: Budget, propagate: Propagate) -> tuple[Pass, ...]:
        return ()

    def apply(
        self, index: int, ffn: FeedForward, plan: LayerPlan, seen: LayerStatistics | None
    ) -> Applied:
        return Applied()
