"""The facts of one compression, as they stand in `camera.json` and later in `metrics.json`."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from camera import MATHEMATICS
from camera.checkpoint.formats.sizes import bits, count
from camera.checkpoint.source import revision_of
from camera.engines.fit import engines
from camera.runtime.files import CheckpointFiles

if TYPE_CHECKING:
    from camera.calibration.statistics import Statistics
    from camera.checkpoint.shards import ShardWriter
    from camera.pipeline.context import PassContext

log = logging.getLogger("camera")
_version = cache(version)  # parsed from a file at each call: a twentieth of a small run


@dataclass
class CompressionResult:
    """What compressing a model did; bytes are those of the weight files."""

    method: str
    model: str
    settings: dict[str, Any]
    sparsity: dict[str, Any]  # asked, of, and realised: moe, model, routed
    bits: dict[str, float]  # per weight: raw, stored with metadata, average of the whole model
    bytes: dict[str, int]  # dense, compressed
    seconds: dict[str, float] = field(default_factory=dict)  # calibrate, compress
    # seconds and peak_memory_bytes of statistics that another run gathered; empty without such
    cached_statistics: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0  # of the process (on an accelerator: of its memory)
    peak_host_memory_bytes: int = 0  # of the process, wherever it computes
    expected_memory_bytes: int = 0  # the same, as estimated when it began
    coverage: dict[str, Any] = field(default_factory=dict)
    super_experts: dict[str, dict[str, float]] = field(default_factory=dict)  # largest outputs
    widths: dict[str, list[int]] = field(default_factory=dict)  # kept, by module path
    full_widths: dict[str, int] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # what the method says of each
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # of each layer
    statistics: str | None = None  # file name inside the checkpoint
    versions: dict[str, str] = field(default_factory=dict)
    revision: str | None = None  # commit of a model of the hub
    checkpoint: str | None = None
    native: bool = False  # loads in transformers without this package
    engines: dict[str, str] = field(default_factory=dict)  # what each needs to serve it

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("camera-moe", "torch", "transformers", "safetensors")
    return {name: _version(name) for name in packages} | {"mathematics": str(MATHEMATICS)}


def report(
    context: PassContext, statistics: Statistics | None, writer: ShardWriter
) -> CompressionResult:
    """The facts of a run whose tensors are all written."""
    request, state, budget = context.request, context.state, context.budget
    sizes, method = writer.sizes, request.method
    compressed = count(sizes, {path: path in state.routed for path in state.widths}, state.modules)
    coverage = _coverage(context, statistics)
    found = super_experts(context)
    for index, experts in found.items():
        told = ", ".join(f"{e} (outputs to {largest:.0f})" for e, largest in experts.items())
        log.info("layer %s: super expert %s", index, told)
    _warn_of_unreached(coverage.get("unreached", []))
    return CompressionResult(
        method=method.name,
        model=request.model,
        settings=method.settings(),
        sparsity={
            "asked": getattr(method, "sparsity", None),
            "of": getattr(method, "sparsity_of", None),
            **budget.dense.sparsity(compressed),
        },
        bits=bits(sizes, state.modules, compressed, budget.weights),
        bytes={"dense": context.streamer.model.reader.bytes, "compressed": writer.bytes},
        seconds={name: round(spent, 3) for name, spent in state.seconds.items()},
        cached_statistics=state.cached,
        peak_memory_bytes=context.memory.bytes,
        peak_host_memory_bytes=context.memory.host_bytes,
        expected_memory_bytes=context.memory.before + context.estimate.peak,
        coverage=coverage,
        super_experts=found,
        widths=state.widths,
        full_widths=state.full_widths,
        calibration=request.tokens.describe() if request.tokens else None,
        statistics=CheckpointFiles.STATISTICS if statistics and statistics.travels else None,
        layers=state.layer_reports,
        measured=state.measured,
        versions=versions(),
        revision=revision_of(context.streamer.model.folder),
        checkpoint=str(request.out),
        native=method.native,
        engines=engines(context.streamer.model.config),
    )


def _coverage(context: PassContext, statistics: Statistics | None) -> dict[str, Any]:
    experts = sum(len(pool.widths) for pool in context.budget.layers.values())
    found: dict[str, Any] = {"experts": experts}
    if statistics is not None:
        unreached = [
            [index, path, expert]
            for index, layer in statistics
            for path, expert in layer.unreached()
        ]
        found |= {"reached": experts - len(unreached), "unreached": unreached}
    if context.state.sources:
        found["sources"] = _by_source(context)
    return found


def _by_source(context: PassContext) -> dict[str, Any]:
    """Of each source of a mixture how many experts it reaches, which not, and its tokens there."""
    found: dict[str, Any] = {}
    for index in sorted(context.state.sources, key=int):
        for source, tokens_E in context.state.sources[index].items():
            entry = found.setdefault(source, {"reached": 0, "unreached": [], "tokens": 0})
            entry["reached"] += sum(count > 0 for count in tokens_E)
            missed = [[int(index), e] for e, count in enumerate(tokens_E) if not count]
            entry["unreached"] += missed
            entry["tokens"] += sum(tokens_E)
    for source, entry in found.items():
        reached, of = entry["reached"], entry["reached"] + len(entry["unreached"])
        log.info("calibration: %s reaches %d of %d experts", source, reached, of)
    return found


def super_experts(context: PassContext) -> dict[str, dict[str, float]]:
    """By layer the super experts, by their number in the pool, and their largest output."""
    context.mark_super_experts()
    found: dict[str, dict[str, float]] = {}
    for index, pool in context.budget.layers.items():
        for expert in pool.super_experts:
            largest = context.state.outliers[str(index)]["largest"][str(expert)]
            found.setdefault(str(index), {})[str(expert)] = largest
    return found


def _warn_of_unreached(unreached: list[list[Any]]) -> None:
    layers: dict[int, list[int]] = {}
    for index, _, expert in unreached:
        layers.setdefault(index, []).append(expert)
    for index, experts in layers.items():
        log.warning(
            "layer %d: no calibration token reached expert %s, so nothing is known of them: raise "
            "calibration.samples to reach more",
            index,
            ", ".join(map(str, experts)),
        )
