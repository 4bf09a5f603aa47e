"""The compressed pass: each layer is loaded, observed, planned, compressed, written and freed.

Shapes: B samples of a batch, L tokens of a sample, H hidden, T = B * L.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from camera.calibration.statistics import LayerStatistics, Statistics
from camera.checkpoint.formats.native import native_modules, native_state
from camera.checkpoint.shards import ShardWriter, sizes_of
from camera.compensation.experts import output_weights
from camera.method import Pass, PassKind, Plan, Seen
from camera.moe.experts.module import ExpertModule
from camera.moe.pool import KeptRows
from camera.pipeline.context import OUTLIERS, SOURCES, PassContext, RunState
from camera.pipeline.passes.measured import of_layer
from camera.pipeline.passes.tokens import CompressedTokens
from camera.pipeline.passes.weights import observe_weights
from camera.pipeline.resume import PassProgress
from camera.runtime import distributed
from camera.runtime.buffers import trim_heap
from camera.runtime.errors import CameraError
from camera.runtime.overlap import BackgroundWriter
from camera.streaming.batches import FfnInput, FfnOutput, FfnPhi, LayerInput
from camera.streaming.memory import BATCH_TOKENS

log = logging.getLogger("camera")

Stage = list[FfnInput] | list[FfnPhi] | list[FfnOutput] | list[LayerInput]
"""Batches somewhere on their way through a layer."""


class CompressedPass:
    """The last pass of a run; goes on where a killed run stopped."""

    def __init__(self, context: PassContext, progress: PassProgress, writer: ShardWriter):
        self._context, self._progress, self._writer = context, progress, writer
        self.listeners = list(context.request.listeners)  # those that see every layer
        self.statistics: Statistics | None = None  # what travels with the checkpoint
        self.plan = Plan(context.method.name, context.method.settings())
        self._open: set[int] = set()  # layers that are planned on the way

    def run(self, step: Pass, seen: Seen, plan: Plan) -> None:
        """Compress and write every layer."""
        context, progress = self._context, self._progress
        self._restore()
        self.plan = plan
        self._open = set(context.budget.layers) - set(plan.layers)
        for index, layer in progress.plans().items():
            self.plan = self.plan.with_layer(index, layer)
        self._begin_listeners(progress.done)
        for index in range(progress.done):
            self._tell(index)
        tokens = None
        if step.tokens:
            with context.state.timed("calibrate"):
                tokens = CompressedTokens(context, progress)
        if step.tokens and _reads_tokens(step):
            self.statistics = Statistics(progress.statistics(), context.about(step.feed))
        else:
            self.statistics = self._earlier(seen)
        with BackgroundWriter(context.streamer.model.device) as writer:
            for index in context.each_layer("compress", progress.done):
                stored = self._layer(step, index, tokens, seen, writer)
                writer.submit(self._finished(index, tokens, stored))
        prefetcher, seconds = context.streamer.model.prefetcher, context.state.seconds
        seconds["disk"] = prefetcher.seconds_read + writer.seconds_worked
        seconds["waited_for_disk"] = prefetcher.seconds_waited + writer.seconds_waited

    def _earlier(self, seen: Seen) -> Statistics | None:
        """The statistics of an earlier pass that travel with the checkpoint."""
        for kind in (PassKind.DENSE, PassKind.BACKWARD):
            if kind in seen:
                return Statistics(dict(seen[kind]), self._context.about("dense"))
        return None

    def _layer(
        self,
        step: Pass,
        index: int,
        tokens: CompressedTokens | None,
        earlier: Seen,
        writer: BackgroundWriter,
    ) -> LayerStatistics | None:
        """Compress one layer; returns its storable statistics."""
        context, state, began = self._context, self._context.state, perf_counter()
        in_pool = index in context.budget.layers
        dense = tokens is not None and step.feed == "dense"
        stage: Stage = []
        with state.timed("compress"):
            context.streamer.load_layer(index)
            if not dense:
                self._prepare(index)
        if tokens is not None:
            if distributed.world() > 1:
                writer.wait()  # no process gets more than a layer ahead of another's files
            with state.timed("calibrate"):
                stage, facts = tokens.attend(index)
            state.report(index, facts)
        writer.wait()  # for the previous layer's shard
        trim_heap()
        seen, stored = None, None
        if tokens is not None:
            with state.timed("calibrate"):
                stage, seen = self._observe(step, index, stage)
        if seen is not None:
            stored = self.statistics.layers[index] = seen.stored()
        elif in_pool:
            seen = self._seen_otherwise(step, index, earlier)
        if dense:
            self._prepare(index)
        kept = None
        if in_pool:
            with state.timed("compress"):
                kept, stage = self._compress(index, seen, tokens, stage)
            trim_heap()
        if tokens is not None:
            with state.timed("calibrate"):
                tokens.batches = self._finish(index, stage, kept)
        for listener in self.listeners:
            listener.layer(index)
        measured = state.measured.setdefault(str(index), {})
        measured["seconds"] = round(perf_counter() - began, 3)
        measured["memory_bytes"] = context.memory.now()
        self._tell(index)
        return stored

    def _tell(self, index: int) -> None:
        listener, measured = self._context.request.listener, self._context.state.measured
        if listener is not None:
            listener.layer(index, measured.get(str(index), {}))

    def _observe(
        self, step: Pass, index: int, inputs: list[FfnInput]
    ) -> tuple[Stage, LayerStatistics | None]:
        """Show the observer a layer of the pool; the batches as the rest of the pass needs them."""
        context, streamer = self._context, self._context.streamer
        if index not in context.budget.layers:
            return (streamer.run_layer(index, inputs) if step.feed == "dense" else inputs), None
        observer = None
        if _reads_tokens(step):
            state = context.state
            found = {SOURCES: state.sources, OUTLIERS: state.outliers}
            spec = context.watched(step.observer, BATCH_TOKENS, found)
            spec.stream(index, [at.residual_BLH for at in inputs[:1]])
            observer = spec.build(index, streamer.model.feed_forward(index))
        stage: Stage = inputs
        if step.feed == "dense":
            stage = streamer.forward(index, inputs, observer)
        elif context.estimate.phi_kept != "none":
            routed = context.estimate.phi_kept == "routed"
            apart = context.method.compensation is not None
            stage = streamer.keep_phi(index, inputs, observer, routed=routed, apart=apart)
        elif observer is not None:
            streamer.observe(index, inputs, observer)
        return stage, None if observer is None else observer.result().all_reduced()

    def _seen_otherwise(self, step: Pass, index: int, earlier: Seen) -> LayerStatistics | None:
        """Statistics of the layer's weights, or of an earlier pass."""
        if step.observer is not None:
            return observe_weights(step, self._context, index)
        return next((earlier[kind][index] for kind in earlier if kind != PassKind.TRIAL), None)

    @torch.no_grad()
    def _prepare(self, index: int) -> None:
        ffn = self._context.streamer.model.feed_forward(index)
        self._context.state.modules |= self._context.method.prepare_layer(index, ffn)

    @torch.no_grad()
    def _compress(
        self,
        index: int,
        seen: LayerStatistics | None,
        tokens: CompressedTokens | None,
        stage: Stage,
    ) -> tuple[KeptRows | None, Stage]:
        """Plan and apply; with compensation the layer's outputs are known afterwards."""
        context, state, method = self._context, self._context.state, self._context.method
        model = context.streamer.model
        ffn = model.feed_forward(index)
        if seen is not None and seen.widths != ffn.widths:
            raise CameraError(f"statistics of layer {index} belong to a model of other widths.")
        state.full_widths |= {group.path: max(group.widths) for group in ffn.groups}
        widths = sum(ffn.widths)
        before = output_weights(ffn) if method.compensation else {}
        if index not in self.plan.layers:
            context.mark_super_experts()
            layer = method.plan_layer(index, ffn, seen, context.budget, self.plan)
            self.plan = self.plan.with_layer(index, layer)
        spared = context.budget.layers[index].super_experts
        if spared and getattr(method, "spare_super_experts", False):
            state.report(index, {"spared": spared})
        applied = method.apply(index, ffn, self.plan.layers[index], seen)
        state.modules |= applied.modules
        state.report(index, applied.report)
        if before:
            stage, facts = tokens.compensate(index, stage, applied.kept, before)
            state.report(index, facts)
        for group in model.feed_forward(index).groups:
            if isinstance(group.module, ExpertModule) and group.module.holds_native:
                raise CameraError(
                    f"method {method.name} leaves the experts of layer {index} where they are, on "
                    "disk: set memory.experts=ram."
                )
            state.widths[group.path] = group.widths
            if group.routed and group.path not in state.routed:
                state.routed = sorted([*state.routed, group.path])
        change = (widths, sum(model.feed_forward(index).widths))
        report = state.layer_reports.get(str(index), {})
        state.measured[str(index)] = of_layer(method, seen, applied.kept, change, report)
        return applied.kept, stage

    def _finish(self, index: int, stage: Stage, kept: KeptRows | None) -> list[LayerInput]:
        """The next layer's inputs, by the layer as it now is."""
        streamer = self._context.streamer
        if not stage or isinstance(stage[0], LayerInput):
            return stage
        if isinstance(stage[0], FfnOutput):
            return streamer.add(index, stage)
        if isinstance(stage[0], FfnPhi):
            return streamer.project(index, stage, kept)
        return streamer.run_layer(index, stage)

    def _finished(
        self, index: int, tokens: CompressedTokens | None, stored: LayerStatistics | None
    ) -> Callable[[], None]:
        """Move a layer's tensors out of the model; returns the write-behind task."""
        context, model = self._context, self._context.streamer.model
        with context.state.timed("compress"):
            if context.method.native:
                native_modules(model.feed_forward(index))
            layer = model.take_out(model.layers[index], f"{model.root}.{index}.")
        hidden = tokens.hidden() if tokens is not None else []
        plan = None
        if index in self.plan.layers and index in self._open:
            plan = replace(self.plan, layers={index: self.plan.layers[index]}, scores={})
        state = context.state.to_dict()
        return partial(self._write, index, layer, state, hidden, stored, plan)

    def _write(
        self,
        index: int,
        layer: dict[str, torch.Tensor],
        state: dict[str, Any],
        hidden: list[torch.Tensor],
        stored: LayerStatistics | None,
        plan: Plan | None,
    ) -> None:
        """Write a layer's shard, then commit the progress."""
        if distributed.rank() == 0:
            self.add(index, layer)
        state |= {"shards": self._writer.state()}
        self._progress.commit(index + 1, state, hidden, stored, plan)

    def add(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write the tensors of a layer, or, under the number after the last, of what is outside."""
        model, on_disk, sizes = self._context.streamer.model, tensors, sizes_of(tensors)
        if self._context.method.native:
            on_disk = native_state(model.model, tensors)
        if model.kept is not None:
            on_disk, sizes = model.kept.restored(dict(on_disk))
        self._writer.add(index, on_disk, sizes)

    def _restore(self) -> None:
        progress, context = self._progress, self._context
        whole = progress.restore() and self._writer.restore(progress.state["shards"])
        if not distributed.all_min(whole):
            progress.clear()  # or a shard is not what was written
            context.request.partial.mkdir(parents=True, exist_ok=True)
            return
        seconds = context.state.seconds
        context.state = RunState.from_dict(progress.state)
        context.state.seconds = {**seconds, **context.state.seconds}

    def _begin_listeners(self, done: int) -> None:
        if self.listeners and done:
            out = self._context.request.out.name
            log.info("%s goes on at layer %d: it is evaluated afterwards.", out, done)
            self.listeners = []
        for listener in self.listeners:
            listener.begin()


def _reads_tokens(step: Pass) -> bool:
    return step.observer is not None and step.observer.reads != "weights"
