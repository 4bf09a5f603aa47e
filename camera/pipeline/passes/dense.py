"""The dense pass: tokens through the original model, its layers observed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from camera.calibration.statistics import LayerStatistics, Statistics
from camera.method import Pass, Seen
from camera.pipeline.cache import gathered_once
from camera.pipeline.context import OUTLIERS, SOURCES, PassContext
from camera.pipeline.resume import PassProgress
from camera.runtime import distributed
from camera.streaming.batches import LayerInput
from camera.streaming.memory import BATCH_TOKENS


class DensePass:
    """Gathers statistics of the dense model, cached for every run that needs the same."""

    def __init__(self, context: PassContext):
        self._context = context

    def run(self, step: Pass, seen: Seen) -> dict[int, LayerStatistics]:
        """Statistics of every layer of the pool."""

        def gather(progress: PassProgress, folder: Path) -> Statistics:
            layers = self._gather(step, progress)
            return Statistics(layers, self._context.about("dense") | noted(progress.state))

        spec = step.observer
        found = gathered_once(self._context, spec.key(), spec.statistics, type(spec), gather)
        self._context.recall(found.about)
        return found.layers

    def _gather(self, step: Pass, progress: PassProgress) -> dict[int, LayerStatistics]:
        context, streamer = self._context, self._context.streamer
        progress.restore()
        state = noted(progress.state)
        spec = context.watched(step.observer, BATCH_TOKENS, state)
        batches = embedded(context)
        if progress.done:
            batches = resumed(batches, progress)
        for index in context.each_layer("measure", progress.done):
            streamer.load_layer(index)
            inputs, seen = streamer.attend(index, batches), None
            if index in context.budget.layers:
                ffn = streamer.model.feed_forward(index)
                spec.stream(index, [at.residual_BLH for at in inputs[:1]])
                observer = spec.build(index, ffn)
                batches = streamer.forward(index, inputs, observer)
                seen = spec.finish(observer.result().all_reduced(), ffn).stored()
            else:
                batches = streamer.run_layer(index, inputs)
            streamer.model.free_layer(index)
            progress.commit(index + 1, state, [batch.hidden_BLH for batch in batches], seen)
        distributed.barrier()  # rank 0 writes what all read
        return progress.statistics()


def noted(state: dict[str, Any]) -> dict[str, Any]:
    """What the state of a pass notes beside statistics."""
    return {SOURCES: dict(state.get(SOURCES, {})), OUTLIERS: dict(state.get(OUTLIERS, {}))}


def embedded(context: PassContext) -> list[LayerInput]:
    """The calibration samples of this rank before the first layer."""
    parts = context.ids_NL.split(context.batch_size(BATCH_TOKENS))
    return context.streamer.embed({"input_ids": ids} for ids in parts)


def resumed(batches: list[LayerInput], progress: PassProgress) -> list[LayerInput]:
    """The same batches where an earlier run left them."""
    states = regrouped(progress.hidden(), [len(batch.hidden_BLH) for batch in batches])
    return [
        LayerInput(batch.arguments, hidden_BLH)
        for batch, hidden_BLH in zip(batches, states, strict=True)
    ]


def regrouped(states: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    """The same samples in batches of these sizes, where a run goes on with others."""
    if [len(part) for part in states] == sizes:
        return states
    return list(torch.cat(states).split(sizes))
