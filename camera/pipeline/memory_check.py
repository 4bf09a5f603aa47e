"""Memory is refused before it is spent, by its largest part and the setting that saves it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from camera.method import Method
from camera.pipeline.estimate import LAYERS_HELD, OUTSIDE_HELD, MemoryEstimate
from camera.runtime.errors import CameraError
from camera.runtime.progress import format_bytes
from camera.streaming.memory import free_memory

TOKEN_BYTES = 16  # of a calibration token: its id, and once more as it is hashed
SAMPLE_BYTES = 512  # of a sample's objects while it is drawn
FEWER = "lower calibration.samples"
LARGER = "it takes a machine with more memory"


class Part(NamedTuple):
    """What stands in memory together with others, and what can be done about it."""

    name: str
    bytes: int
    way_out: str


def require_memory(
    estimate: MemoryEstimate, method: Method, device: torch.device, tokens: int, samples: int
) -> None:
    """CameraError where a run over so many tokens takes more memory than is free.

    Host and device are two sums: on an accelerator one layer is computed with what a batch takes,
    while hidden states and the layers that are read and written wait in the system's memory.
    """
    ids = Part("the calibration tokens", TOKEN_BYTES * tokens + SAMPLE_BYTES * samples, FEWER)
    hidden = Part("the hidden states", estimate.states, f"set memory.hidden=disk, or {FEWER}")
    apart = device.type == "cuda"
    saved = estimate.experts and not estimate.experts_on_disk and method.compensation is None
    on_disk = "set memory.experts=disk" if saved else LARGER
    kept = estimate.phi * estimate.keep_phi
    way = "set memory.phi=recompute" if method.compensation is None else FEWER
    computing = [
        Part("a layer's activations", kept, way),
        Part(
            f"method {method.name}" if estimate.method > estimate.working else "a batch",
            estimate.work,
            f"choose another method, or {FEWER}" if estimate.method > estimate.working else LARGER,
        ),
    ]
    layers = Part("the layers", estimate.layers(LAYERS_HELD - apart), on_disk)
    outside = Part("embeddings and head", int(OUTSIDE_HELD * estimate.outside), LARGER)
    logits = Part("logits", estimate.logits, LARGER)
    if not apart:
        _require([ids, hidden, layers, *computing], device, "memory")
        _require([ids, hidden._replace(bytes=0), outside, logits], device, "memory")
        return
    _require([ids, hidden, layers], torch.device("cpu"), "the system's memory")
    one = layers._replace(name="a layer", bytes=estimate.layers(1))
    _require([one, *computing], device, f"the memory of {device}")
    _require([outside, logits], device, f"the memory of {device}")


def _require(parts: list[Part], device: torch.device, what: str) -> None:
    needed, free = sum(part.bytes for part in parts), free_memory(device)
    if needed > free:
        most = max(parts, key=lambda part: part.bytes)
        raise CameraError(
            f"this takes about {format_bytes(needed)} of {what}, where {format_bytes(free)} are "
            f"free; the most, {format_bytes(most.bytes)}, goes to {most.name}: {most.way_out}."
        )
