"""From a finished job to what it reports: counts from the written tensors, coverage, warnings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from camera.budget import count
from camera.result import CompressionResult, unquantised_bits, versions

if TYPE_CHECKING:
    from camera.job import Job

ENERGIES = "energies.safetensors"
log = logging.getLogger("camera")


def report(job: Job) -> CompressionResult:
    """The facts of a job whose tensors are all written."""
    streamer, dense = job.streamer, job.streamer.budget.dense
    compressed = count(job.writer.sizes, {path: path in job.routed for path in job.widths})
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
        bits=unquantised_bits(compressed),
        bytes={"dense": streamer.reader.bytes, "compressed": job.writer.bytes},
        seconds={name: round(spent, 3) for name, spent in job.seconds.items()},
        peak_memory_bytes=job.memory.bytes,
        coverage=coverage,
        widths=job.widths,
        full_widths=job.full_widths,
        calibration=job.calibration.tokens.describe() if job.calibration else None,
        energies=ENERGIES if job.energies else None,
        versions=versions(),
        checkpoint=str(job.out),
    )


def _coverage(job: Job) -> dict[str, Any]:
    pools = [width for pool in job.streamer.budget.layers.values() for width in pool.widths]
    planned = sum(job.full_widths[path] * len(kept) for path, kept in job.widths.items())
    found = {"experts": len(pools), "parameters_covered": planned / max(sum(pools), 1)}
    if job.energies is not None:
        unreached = [
            [index, path, expert]
            for index, layer in job.energies
            for path, expert in layer.unreached()
        ]
        found |= {"reached": len(pools) - len(unreached), "unreached": unreached}
    return found


def _warn_of_unreached(unreached: list[list[Any]]) -> None:
    layers: dict[int, list[int]] = {}
    for index, _, expert in unreached:
        layers.setdefault(index, []).append(expert)
    for index, experts in layers.items():
        log.warning(
            "layer %d: no calibration token reached expert %s, so their energy is zero: raise "
            "calibration.samples to reach more",
            index,
            ", ".join(map(str, experts)),
        )
