"""The refusal of a run that takes more memory than is free, before it starts."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from camera.method import Method
from camera.pipeline.memory.device import LAYERS_HELD, OUTSIDE_HELD
from camera.pipeline.memory.estimate import MemoryEstimate
from camera.pipeline.memory.moments import Moments
from camera.runtime.device.accelerator import free_memory
from camera.runtime.errors import CameraError
from camera.runtime.progress import format_bytes

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

    Host and device are two sums: on an accelerator everything is computed and waits there, but for
    hidden states that have no room, for what is read and written, and for what a method keeps.
    """
    ids = Part("the calibration tokens", TOKEN_BYTES * tokens + SAMPLE_BYTES * samples, FEWER)
    hidden = Part("the hidden states", estimate.states, f"set memory.hidden=disk, or {FEWER}")
    saved = estimate.experts and not estimate.experts_on_disk and method.compensation is None
    on_disk = "set memory.experts=disk" if saved else LARGER
    way = "set memory.phi=recompute" if method.compensation is None else FEWER
    other = f"choose another method, or {FEWER}"
    if estimate.device is not None:
        named = {
            "staged": ("buffers of layers", LARGER),
            "layers": ("the layers", on_disk),
            "routing": ("tokens of experts on disk", f"set memory.experts=ram, or {FEWER}"),
            "phi": ("a layer's activations", way),
            "batch": ("a batch", LARGER),
            "sample": ("a batch", LARGER),
            "method": (f"method {method.name}", other),
            "gradients": ("the gradients of all tokens", FEWER),
            "outside": ("embeddings and head", LARGER),
            "logits": ("logits", LARGER),
        }
        for parts in _by_moment(estimate.host, named | {"hidden": hidden[::2]}):
            _require([ids, *parts], torch.device("cpu"), "the system's memory")
        away = hidden.name, "set memory.hidden=ram"
        for parts in _by_moment(estimate.device, named | {"hidden": away}):
            _require(parts, device, f"the memory of {device}")
        return
    most = estimate.method > estimate.working
    computing = [
        Part("a layer's activations", estimate.phi_held, way),
        Part(
            f"method {method.name}" if most else "a batch", estimate.work, other if most else LARGER
        ),
    ]
    layers = Part("the layers", estimate.layers(LAYERS_HELD), on_disk)
    outside = Part("embeddings and head", int(OUTSIDE_HELD * estimate.outside), LARGER)
    logits = Part("logits", estimate.logits, LARGER)
    _require([ids, hidden, layers, *computing], device, "memory")
    _require([ids, hidden._replace(bytes=0), outside, logits], device, "memory")


def _by_moment(memory: Moments, named: Mapping[str, tuple[str, str]]) -> Iterator[list[Part]]:
    """The parts of each moment, with their names and ways out."""
    for parts in memory.moments.values():
        yield [Part(named[key][0], size, named[key][1]) for key, size in parts.items()]


def _require(parts: list[Part], device: torch.device, what: str) -> None:
    needed, free = sum(part.bytes for part in parts), free_memory(device)
    if needed > free:
        most = max(parts, key=lambda part: part.bytes)
        raise CameraError(
            f"this takes about {format_bytes(needed)} of {what}, where {format_bytes(free)} are "
            f"free; the most, {format_bytes(most.bytes)}, goes to {most.name}: {most.way_out}."
        )
