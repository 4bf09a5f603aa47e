"""The weights pass: layers one by one, without tokens."""

from __future__ import annotations

from camera.calibration.statistics import LayerStatistics
from camera.method import Pass, Seen
from camera.pipeline.context import PassContext


class WeightsPass:
    """Gathers statistics of the weights of all layers."""

    def __init__(self, context: PassContext):
        self._context = context

    def run(self, step: Pass, seen: Seen) -> dict[int, LayerStatistics]:
        """Statistics of every layer of the pool."""
        found, model = {}, self._context.streamer.model
        for index in self._context.each_layer("weigh", 0):
            if index in model.budget.layers:
                self._context.streamer.load_layer(index)
                found[index] = observe_weights(step, self._context, index)
                model.free_layer(index)
        return found


def observe_weights(step: Pass, context: PassContext, index: int) -> LayerStatistics:
    """What the pass's observer says of a loaded layer's weights."""
    ffn = context.streamer.model.feed_forward(index)
    return step.observer.finish(step.observer.build(index, ffn).result(), ffn)
