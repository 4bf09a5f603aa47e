"""The uncompressed model."""

from dataclasses import dataclass
from typing import ClassVar

from camera.calibration.statistics import LayerStatistics
from camera.method import Method, Outcome
from camera.moe.budget import Budget
from camera.moe.feed_forward import FeedForward


@dataclass
class Dense(Method):
    """Nothing is compressed: the first row of every table."""

    name: ClassVar[str] = "dense"
    calibrates: ClassVar[bool] = False
    compresses: ClassVar[bool] = False

    def check(self, budget: Budget) -> None:
        """Any model will do."""

    def compress(
        self, index: int, ffn: FeedForward, seen: LayerStatistics | None, budget: Budget
    ) -> Outcome:
        return Outcome({})
