"""State of a compression: what a run must remember to go on after the layers that are done."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Any

from camera.method import Spec


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
