"""One compression under way: measure, plan, slice, write, layer after layer."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from camera.calibration.statistics import LayerStatistics, Statistics
from camera.checkpoint.native import native_state
from camera.checkpoint.shards import ShardWriter
from camera.checkpoint.source import fingerprint
from camera.compensation.experts import output_weights
from camera.evaluation.suite import Passenger
from camera.method import Method
from camera.moe.pool import Kept
from camera.pipeline.estimate import Needs
from camera.pipeline.passes.dense import Measurement, code_and_device
from camera.pipeline.resume import Progress
from camera.runtime import distributed
from camera.runtime.buffers import give_back
from camera.runtime.errors import CameraError
from camera.runtime.overlap import Background
from camera.runtime.peak_memory import PeakMemory
from camera.runtime.progress import each_layer
from camera.streaming.disk_experts import VisitedExperts
from camera.streaming.memory import HIDDEN_HELD
from camera.streaming.streamer import Streamer

log = logging.getLogger("camera")


class Job:
    """What `compress` drives, and what it has found so far."""

    def __init__(
        self, model: str, streamer: Streamer, method: Method, out: Path, *, show_progress: bool
    ):
        self.model, self.streamer, self.method, self.out = model, streamer, method, out
        self.show_progress = show_progress
        self.calibration: Measurement | None = None
        self.passenger: Passenger | None = None
        self.needs: Needs | None = None  # set by `compress` before it starts
        self.memory = PeakMemory(streamer.device)
        self.statistics: Statistics | None = None
        self.seconds = {"calibrate": 0.0, "compress": 0.0}
        self.modules: dict[str, dict[str, Any]] = {}  # path -> form of what stands there now
        self.widths: dict[str, list[int]] = {}
        self.full_widths: dict[str, int] = {}
        self.routed: set[str] = set()
        self.layer_reports: dict[str, dict[str, Any]] = {}
        self.partial = out.with_name(f".{out.name}.partial")
        self.seen = out.with_name(f".{out.name}.seen")  # statistics nobody else asked for
        self.writer = ShardWriter(self.partial, len(streamer.layers) + 1)

    def bytes_to_come(self) -> int:
        """What this job may still write: the dense size, less what a killed run wrote already, and
        the hidden states that it keeps there."""
        written = sum(path.stat().st_size for path in self.partial.glob("*.safetensors"))
        tables = 2 + (HIDDEN_HELD if self.needs.hidden_on_disk else 0)
        if self.method.backward:  # every layer's input waits for the way back
            tables += len(self.streamer.layers)
        left = max(self.streamer.budget.dense.bytes - written, 0)
        return left + tables * self.needs.hidden

    @property
    def watches(self) -> bool:
        """Whether layers are measured as they are compressed, and not all of them before."""
        method = self.method
        return method.calibrates and not (method.one_shot and method.storable)

    @property
    def tokens(self) -> int:
        """Calibration tokens that this process sends through the model."""
        return self.calibration.mine.ids_NL.numel() if self.calibration else 0

    def measure_once(self, folder: Path | None) -> None:
        """See all of the original model, kept in `folder` for whoever asks for it next."""
        with self.timed("calibrate"):
            calibration, budget = self.calibration, self.streamer.budget
            self.statistics = calibration.dense_statistics(folder or self.seen)
            layers = self.statistics.layers
            if trials := self.method.trials(layers, budget):
                self.method.cuts = calibration.cuts(trials, folder or self.seen).layers
            self.method.prepare(layers, budget)

    def weigh(self) -> None:
        """See the weights alone, where all layers are ranked together without tokens."""
        found, streamer = {}, self.streamer
        for i in self.each_layer("weigh", 0):
            if i in streamer.budget.layers:
                streamer.load_layer(i)
                found[i] = self.method.observer(i, streamer.feed_forward(i)).result()
                streamer.free(streamer.layers[i])
        self.method.prepare(found, streamer.budget)

    def compress_layers(self, tokens: Literal["compressed", "dense"] | None) -> None:
        """Compress and write every layer, going on where a killed run stopped.

        `tokens` says whether calibration tokens pass through the layers on the way, and whether a
        layer gets what the compressed or what the dense layers before it put out; without, layers
        are compressed by what `measure_once` saw, if the method wants any.
        """
        streamer, calibration = self.streamer, self.calibration if tokens else None
        progress = self.progress = self._progress(tokens)
        self._restore(progress)
        self._board(progress.done)
        dense, trace = tokens == "dense", False
        if calibration is not None:
            if self.watches:
                self.statistics = Statistics(progress.statistics(), calibration.about(tokens))
            trace = self.needs.keep_phi and not dense
            with self.timed("calibrate"):
                calibration.start(progress, compensates=True)
        with Background() as behind:
            for i in self.each_layer("compress", progress.done):
                stored = self._one_layer(i, calibration, dense, trace, behind)
                behind.submit(self._finished(i, calibration, stored))
        ahead = streamer.ahead
        self.seconds["disk"] = ahead.seconds_read + behind.seconds_worked
        self.seconds["waited for disk"] = ahead.seconds_waited + behind.seconds_waited

    def _one_layer(
        self,
        index: int,
        calibration: Measurement | None,
        dense: bool,
        trace: bool,
        behind: Background,
    ) -> LayerStatistics | None:
        """Load, measure, compress and propagate; what is worth keeping of what was seen."""
        streamer, seen, kept, stored = self.streamer, None, None, None
        in_pool = index in streamer.budget.layers
        with self.timed("compress"):
            streamer.load_layer(index)
            if not dense:
                self._enter(index)
        if calibration is not None:
            if distributed.world() > 1:
                behind.wait()  # no process gets more than a layer ahead of another's files
            with self.timed("calibrate"):
                report = calibration.attend(index)
            if report:
                self.layer_reports[str(index)] = report
        behind.wait()  # the layer before is on the disk,
        give_back()  # and out of memory
        if calibration is not None:
            with self.timed("calibrate"):
                if in_pool and self.watches:
                    seen = calibration.measure(index, propagate=dense, trace=trace)
                    stored = self.statistics.layers[index] = seen.stored()
                elif in_pool:
                    calibration.trace(index)
                elif dense:
                    calibration.propagate(index)
        if seen is None and self.statistics is not None:
            seen = self.statistics.layers.get(index)
        elif seen is None and in_pool:
            seen = self.method.observer(index, streamer.feed_forward(index)).result()
        if dense:
            self._enter(index)
        if in_pool:
            with self.timed("compress"):
                kept = self._compress(index, seen)
            give_back()
        if calibration is not None and not dense:
            with self.timed("calibrate"):
                calibration.propagate(index, kept)
        if self.passenger is not None:
            self.passenger.layer(index)
        return stored

    def _board(self, done: int) -> None:
        if self.passenger is not None and done:
            log.info("%s goes on at layer %d: it is evaluated afterwards.", self.out.name, done)
            self.passenger = None
        if self.passenger is not None:
            self.passenger.begin()

    def _finished(
        self, index: int, calibration: Measurement | None, stored: LayerStatistics | None
    ) -> Callable[[], None]:
        """Empty a layer; what is then left to do. Nothing else holds on to its tensors."""
        streamer = self.streamer
        with self.timed("compress"):
            layer = streamer.take_out(streamer.layers[index], f"{streamer.root}.{index}.")
        hidden = calibration.hidden() if calibration is not None else []
        return partial(self._keep, index, layer, self._state(), hidden, stored)

    def _keep(
        self,
        index: int,
        layer: dict[str, torch.Tensor],
        state: dict[str, Any],
        hidden: list[torch.Tensor],
        stored: LayerStatistics | None,
    ) -> None:
        """Put a finished layer on the disk, then say that it is there."""
        if distributed.rank() == 0:
            self.add(index, layer)
        state |= {"shards": self.writer.state()}
        self.progress.commit(index + 1, state, hidden, stored)

    def each_layer(self, title: str, start: int) -> Iterator[int]:
        """The layers from `start` on; how far it is, the first process tells."""
        count, show = len(self.streamer.layers), self.show_progress and distributed.rank() == 0
        return each_layer(start, count, title, self.memory, show)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of a block to a part of the job."""
        start = perf_counter()
        yield
        self.seconds[part] += perf_counter() - start

    def add(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write the tensors of a layer, or, under the number after the last, of what is outside."""
        on_disk = native_state(self.streamer.model, tensors) if self.method.native else tensors
        self.writer.add(index, on_disk, counted=tensors)

    def _progress(self, tokens: str | None) -> Progress:
        settings = {
            "weights": fingerprint(self.streamer.folder),
            "method": self.method.name,
            **self.method.settings(),
            "calibration": self.calibration.tokens.hash if self.calibration else None,
            "propagate": tokens or "dense",
            "phi kept": self.needs.keep_phi,
            "experts visited": self.needs.visit,
            "dtype": str(self.streamer.dtype),
            "stored dtype": str(self.streamer.stored_dtype),
        }
        settings |= code_and_device(self.streamer, type(self.method))
        return Progress(self.partial / "progress", settings)

    def _restore(self, progress: Progress) -> None:
        whole = progress.restore() and self.writer.restore(progress.state["shards"])
        if not distributed.least(whole):
            progress.clear()  # or a shard is not what was written
            self.partial.mkdir(parents=True, exist_ok=True)
            return
        for name in ("modules", "widths", "full_widths", "layer_reports", "seconds"):
            setattr(self, name, progress.state[name])
        self.routed = set(progress.state["routed"])

    def _state(self) -> dict[str, Any]:
        found = {
            "modules": self.modules,
            "widths": self.widths,
            "full_widths": self.full_widths,
            "layer_reports": self.layer_reports,
            "routed": sorted(self.routed),
            "seconds": self.seconds,
        }
        return copy.deepcopy(found)

    @torch.no_grad()
    def _enter(self, index: int) -> None:
        self.modules |= self.method.enter(index, self.streamer.feed_forward(index))

    @torch.no_grad()
    def _compress(self, index: int, seen: LayerStatistics | None) -> Kept | None:
        streamer, ffn = self.streamer, self.streamer.feed_forward(index)
        if seen is not None and seen.widths != ffn.widths:
            raise CameraError(f"statistics of layer {index} belong to a model of other widths.")
        self.full_widths |= {group.path: max(group.widths) for group in ffn.groups}
        before = output_weights(ffn) if self.method.compensation else {}
        outcome = self.method.compress(index, ffn, seen, streamer.budget)
        self.modules |= outcome.modules
        if before:
            outcome.report |= self.calibration.compensate(index, outcome.kept, before)
        if outcome.report:
            self.layer_reports.setdefault(str(index), {}).update(outcome.report)
        for group in streamer.feed_forward(index).groups:
            if isinstance(group.module, VisitedExperts):
                raise CameraError(
                    f"method {self.method.name} leaves the experts of layer {index} where they "
                    "are, on disk: set memory.experts=ram."
                )
            self.widths[group.path] = group.widths
            if group.routed:
                self.routed.add(group.path)
        return outcome.kept
