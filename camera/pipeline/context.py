"""The context of the passes of one compression: request, streamed model, tokens, progress."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

from camera.calibration.experts.coverage import BySource
from camera.calibration.experts.super_experts import WithOutliers, super_experts
from camera.calibration.observers import ObserverSpec
from camera.calibration.tokens import CalibrationTokens
from camera.method import Method, Plan, Propagate, Spec
from camera.moe.budget import Budget
from camera.pipeline.memory.estimate import MemoryEstimate
from camera.pipeline.result import versions
from camera.runtime import distributed
from camera.runtime.device.peak_memory import PeakMemory
from camera.runtime.files import partial_of
from camera.runtime.progress import each_layer
from camera.streaming.streamer import LayerStreamer

SOURCES, OUTLIERS = "sources", "outliers"  # what is noted beside statistics, in states and files


class LayerListener(Protocol):
    """Looks at each compressed layer while it is in memory."""

    def begin(self) -> None:
        """Called before the first layer."""

    def layer(self, index: int) -> None:
        """Called when a layer is compressed."""

    def results(self, peak_memory_bytes: int) -> dict[str, Any]:
        """Called after the last layer; what stands in evaluation.json."""


class CompressionListener(Protocol):
    """Is told how a compression goes, on the first process."""

    def begin(self) -> None:
        """Nothing is refused any more: the first weight is about to be read."""

    def layer(self, index: int, measured: Mapping[str, float]) -> None:
        """A layer is compressed; of a run that goes on also those that were compressed before.

        `measured` are its `seconds`, `memory_bytes` and what `passes.measured.of_layer` knows.
        """


@dataclass(frozen=True)
class CompressionRequest:
    """The arguments of `camera.compress`."""

    model: str  # what model card and report call the base model
    method: Method
    out: Path
    propagate: Propagate = "compressed"
    tokens: CalibrationTokens | None = None
    statistics: Path | None = None  # folder of the shared cache
    plan: Plan | None = None  # given, not made
    listeners: Sequence[LayerListener] = ()
    listener: CompressionListener | None = None  # is told how it goes
    show_progress: bool = True

    @property
    def partial(self) -> Path:
        """Where the checkpoint grows until it is complete."""
        return partial_of(self.out)

    @property
    def private_statistics(self) -> Path:
        """Private statistics cache, removed when the checkpoint is complete."""
        return self.out.with_name(f".{self.out.name}.statistics")


@dataclass
class RunState:
    """What the finished layers of a run left to know."""

    modules: dict[str, Spec] = field(default_factory=dict)  # path -> spec of what stands there now
    widths: dict[str, list[int]] = field(default_factory=dict)  # of every expert, by path
    full_widths: dict[str, int] = field(default_factory=dict)  # before compression
    routed: list[str] = field(default_factory=list)  # paths of routed experts
    layer_reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # of each layer
    seconds: dict[str, float] = field(default_factory=lambda: {"calibrate": 0.0, "compress": 0.0})
    cached: dict[str, float] = field(default_factory=dict)  # `cached_statistics` of the report
    sources: dict[str, Any] = field(default_factory=dict)  # by source, what reached whom
    outliers: dict[str, Any] = field(default_factory=dict)  # largest outputs of experts
    shards: dict[str, Any] = field(default_factory=dict)  # of checkpoint.shards.ShardWriter

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return copy.deepcopy({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> RunState:
        """The inverse of `to_dict`."""
        return cls(**found)

    def report(self, index: int, facts: dict[str, Any]) -> None:
        """Add facts to the report of a layer."""
        if facts:
            self.layer_reports.setdefault(str(index), {}).update(facts)

    def used(self, seconds: float, peak_memory_bytes: int) -> None:
        """Add what statistics cost another run, which this one read."""
        self.cached["seconds"] = self.cached.get("seconds", 0.0) + seconds
        peak = max(self.cached.get("peak_memory_bytes", 0), peak_memory_bytes)
        self.cached["peak_memory_bytes"] = peak

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of a block to a part of the run."""
        start = perf_counter()
        yield
        self.seconds[part] += perf_counter() - start


@dataclass
class PassContext:
    """The objects that every pass of a run uses."""

    request: CompressionRequest
    streamer: LayerStreamer
    estimate: MemoryEstimate
    memory: PeakMemory
    state: RunState = field(default_factory=RunState)
    halvings: int = 0  # how often a batch was halved for want of memory

    @property
    def method(self) -> Method:
        return self.request.method

    @property
    def budget(self) -> Budget:
        return self.streamer.model.budget

    @property
    def ids_NL(self) -> torch.Tensor:
        """The calibration samples of this rank."""
        return distributed.shard_samples(self.request.tokens.ids_NL)

    def watched(self, spec: ObserverSpec, batch_tokens: int, found: dict[str, Any]) -> WithOutliers:
        """The spec with what is noted in `found` beside it: experts' outliers, and of a mixture
        what each source reaches."""
        tokens = self.request.tokens
        if not tokens.sources:
            return WithOutliers(spec, found[OUTLIERS])
        dealt = distributed.shard_samples(torch.tensor(tokens.dealt)).tolist()
        size, length = self.batch_size(batch_tokens), tokens.ids_NL.shape[1]
        by_source = BySource(spec, list(tokens.sources), dealt, size, length, found[SOURCES])
        return WithOutliers(by_source, found[OUTLIERS])

    def recall(self, about: dict[str, Any]) -> None:
        """Take over what was noted beside statistics, from the head of their file."""
        self.state.sources = about.get(SOURCES, {})
        self.state.outliers = about.get(OUTLIERS, {})

    def mark_super_experts(self) -> None:
        """Mark in the pools of the model the super experts that are known so far.

        A layer's only expert, a dense FFN, is none: there is no other to cut in its stead.
        """
        layers = self.budget.layers
        experts = sum(len(pool.widths) for pool in layers.values())
        known = super_experts(self.state.outliers, experts, len(self.streamer.model.layers))
        for index, pool in layers.items():
            pool.super_experts = known.get(index, []) if len(pool.widths) > 1 else []

    def batch_size(self, tokens: int) -> int:
        """How many samples make a batch of so many tokens."""
        return max(1, (tokens >> self.halvings) // self.request.tokens.ids_NL.shape[1])

    def each_layer(self, title: str, start: int) -> Iterator[int]:
        """The layers from `start` on; the first process shows how far it is."""
        count = len(self.streamer.model.layers)
        show = self.request.show_progress and distributed.rank() == 0
        return each_layer(start, count, title, self.memory, show)

    def about(self, propagate: Propagate) -> dict[str, Any]:
        """What statistics were gathered on, for their file."""
        return {
            "model": self.request.model,
            "propagate": propagate,
            "calibration": self.request.tokens.describe(),
            "dtype": str(self.streamer.model.dtype),
            "device": self.streamer.model.device.type,
            "processes": distributed.world(),
            "versions": versions(),
        }
