"""From a finished job to what it reports: counts from the written tensors, coverage, warnings."""

import logging
from typing import Any

from camera.checkpoint.sizes import bits, count
from camera.pipeline.compression import Job
from camera.pipeline.result import CompressionResult, versions

STATISTICS = "statistics.safetensors"
log = logging.getLogger("camera")


def report(job: Job) -> CompressionResult:
    """The facts of a job whose tensors are all written."""
    streamer, dense = job.streamer, job.streamer.budget.dense
    sizes, forms = job.writer.sizes, job.modules
    compressed = count(sizes, {path: path in job.routed for path in job.widths}, forms)
    coverage = _coverage(job)
    _warn_of_unreached(coverage.get("unreached", []))
    return CompressionResult(
        method=job.method.name,
        model=job.model,
        settings=job.method.settings(),
        sparsity={
            "asked": getattr(job.method, "sparsity", None),
            "of": getattr(job.method, "sparsity_of", None),
            **dense.sparsity(compressed),
        },
        bits=bits(sizes, forms, compressed, streamer.budget.weights),
        bytes={"dense": streamer.reader.bytes, "compressed": job.writer.bytes},
        seconds={name: round(spent, 3) for name, spent in job.seconds.items()},
        peak_memory_bytes=job.memory.bytes,
        expected_memory_bytes=job.memory.before + job.needs.peak,
        coverage=coverage,
        widths=job.widths,
        full_widths=job.full_widths,
        calibration=job.calibration.tokens.describe() if job.calibration else None,
        statistics=STATISTICS if job.statistics and job.statistics.travels else None,
        layers=job.layer_reports,
        versions=versions(),
        checkpoint=str(job.out),
    )


def _coverage(job: Job) -> dict[str, Any]:
    experts = sum(len(pool.widths) for pool in job.streamer.budget.layers.values())
    found: dict[str, Any] = {"experts": experts}
    if job.statistics is not None:
        unreached = [
            [index, path, expert]
            for index, layer in job.statistics
            for path, expert in layer.unreached()
        ]
        found |= {"reached": experts - len(unreached), "unreached": unreached}
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
