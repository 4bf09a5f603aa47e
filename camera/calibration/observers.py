"""Observers of a layer, and the specs that state their cost and build them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from camera.calibration.statistics import LayerStatistics
from camera.moe.observer import Observer

if TYPE_CHECKING:
    from camera.moe.feed_forward import FeedForward
    from camera.moe.pool import LayerShape


class LayerObserver(Observer, ABC):
    """Looks at one layer in a pass, and says what it saw."""

    @abstractmethod
    def result(self) -> LayerStatistics:
        """Statistics of this process's tokens."""


@dataclass(frozen=True)
class ObserverSpec(ABC):
    """The observer of each layer in a pass; the fields are its settings."""

    statistics: ClassVar[type[LayerStatistics]]
    reads: ClassVar[Literal["activations", "gradients", "weights"]] = "activations"

    def key(self) -> dict[str, Any]:
        """What decides the statistics besides model and tokens: runs that agree share them."""
        return {"kind": self.statistics.kind, **asdict(self)}

    @abstractmethod
    def build(self, index: int, ffn: FeedForward) -> LayerObserver:
        """The observer of layer `index`."""

    def nbytes(self, layer: LayerShape) -> int:
        """Bytes that the observer and its result hold beside the layer, at most, where it is
        computed; vectors of a number per micro-expert count as nothing."""
        return 0

    def host_bytes(self, layer: LayerShape) -> int:
        """Bytes that observer, result and what is made of it hold on the host, wherever the layer
        is computed; vectors of a number per micro-expert count as nothing."""
        return 0

    def result_bytes(self, layer: LayerShape) -> int:
        """Bytes that making the result takes beside these, when the last batch is through."""
        return 0

    def single_process(self) -> str | None:
        """Why several processes' results don't add up; None where they do."""
        if self.reads == "weights" or self.statistics.reduced is not None:
            return None
        kind = self.statistics.kind
        return f"what this method sees of a layer ({kind}) can't be added up over processes"

    def finish(self, seen: LayerStatistics, ffn: FeedForward) -> LayerStatistics:
        """What is kept of a layer after all processes' results were added up."""
        return seen
