"""The estimate of peak memory over all passes of a run, and its refusal.

Shapes: T calibration tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from camera.calibration.trials import trial_bytes
from camera.compensation.experts import fit_bytes
from camera.method import Method, Pass, PassKind
from camera.moe.pool import LayerShape
from camera.runtime.errors import CameraError
from camera.runtime.progress import format_bytes
from camera.streaming.lm_head import HEAD_LOGITS, HEAD_TABLES
from camera.streaming.memory import (
    BACKWARD_TOKENS,
    BATCH_TOKENS,
    HIDDEN_HELD,
    HIDDEN_SHARE,
    active_width,
    free_memory,
    parameters_of,
    total_memory,
)
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel

PHI_LIMIT = 8 * 2**30  # bytes of phi of one layer that `phi=auto` keeps
LAYERS_HELD = 3  # one computed, one prefetched or converted, one pruned or being written
OUTSIDE_HELD = 1.5  # embeddings and head, and the one of them that is converted
# What computing a batch takes, in tables of its hidden states: its attention, or its experts' few
# tokens each; and, per expert of a token, when a whole FFN runs on it.
BATCH_TABLES = 8
SLOT_TABLES = 4
GRAPH_TABLES = 12  # of a layer's graph, of hidden states and of phi each
TOKEN_BYTES = 16  # of a calibration token: its id, and once more as it is hashed
SAMPLE_BYTES = 512  # of a sample's objects while it is drawn
FEWER = "lower calibration.samples"
LARGER = "it takes a machine with more memory"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a run, and the choices derived from them."""

    layer: int  # the largest, as it is computed
    experts: int  # of the largest layer, routed
    outside: int  # embeddings, final norm, head
    hidden: int  # one table of hidden states
    phi: int  # of the widest layer
    working: int  # what computing one batch takes
    method: int  # statistics and workspace of the method, beside the layer
    logits: int  # at a time, where a pass computes them
    keep_phi: bool
    hidden_on_disk: bool
    experts_on_disk: bool

    @property
    def peak(self) -> int:
        """What the run adds to the process at most.

        c1 * largest layer + c2 * hidden states + phi + what a batch or the method takes; experts
        that stay on disk count once.
        """
        head = self.logits + HIDDEN_HELD * self.hidden if self.logits else 0
        in_layers = self.layers(LAYERS_HELD) + self.states + self.work + self.phi * self.keep_phi
        return max(in_layers, int(OUTSIDE_HELD * self.outside) + head)

    def layers(self, held: int) -> int:
        """Bytes of so many layers; experts that stay on disk count once."""
        experts = (1 - held) * self.experts if self.experts_on_disk else 0
        return held * self.layer + experts

    @property
    def states(self) -> int:
        """Hidden states in RAM."""
        return 0 if self.hidden_on_disk else HIDDEN_HELD * self.hidden

    @property
    def work(self) -> int:
        """What a batch or the method takes."""
        return max(self.working, self.method)

    def __str__(self) -> str:
        experts = ", its experts on disk" if self.experts_on_disk else ""
        place = "on disk" if self.hidden_on_disk else "in memory"
        phi = "kept" if self.keep_phi else "recomputed"
        work = f"; method {format_bytes(self.method)}" if self.method else ""
        return (
            f"layer {format_bytes(self.layer)}{experts}; hidden states "
            f"{format_bytes(self.hidden)} {place}; activations {format_bytes(self.phi)} {phi}; "
            f"batch {format_bytes(self.working)}{work}"
        )

    @classmethod
    def of(
        cls,
        model: MetaModel,
        method: Method,
        passes: Sequence[Pass],
        memory: MemoryChoices,
        tokens: int,
    ) -> MemoryEstimate:
        """The estimate of these passes over so many calibration tokens.

        What changes rounding (phi, experts) is decided by sizes alone, never by what is free now.
        """
        size, config = model.dtype.itemsize, model.config
        layers = [parameters_of(layer) * size for layer in model.layers]
        routed = [model.feed_forward(i).routed for i in range(len(layers))]
        experts = [group.module_size * size if group else 0 for group in routed]
        hidden, width = tokens * config.hidden_size * size, active_width(model)
        phi = int(tokens * width * size)
        on_disk = memory.experts == "disk"
        if memory.experts == "auto":
            on_disk = LAYERS_HELD * max(layers) > total_memory(model.device)
        on_disk = on_disk and max(experts) > 0 and not model.compressed
        keep_phi = memory.phi == "keep" or (memory.phi == "auto" and phi <= PHI_LIMIT)
        keep_phi = keep_phi and method.slices and not on_disk and tokens > 0
        hidden_on_disk = memory.hidden == "disk"
        if memory.hidden == "auto":
            free = psutil.virtual_memory().available
            hidden_on_disk = HIDDEN_HELD * hidden > HIDDEN_SHARE * free
        top_k = model.family.top_k(config) if max(experts) else 1
        tables = BATCH_TABLES if keep_phi else BATCH_TABLES + SLOT_TABLES * top_k
        working = min(tokens, BATCH_TOKENS) * config.hidden_size * size * tables
        kinds = {step.kind for step in passes}
        if PassKind.BACKWARD in kinds:
            graph = GRAPH_TABLES * (config.hidden_size + width) * size
            working = max(working, int(min(tokens, BACKWARD_TOKENS) * graph))
        asks_head = bool(kinds & {PassKind.BACKWARD, PassKind.TRIAL})
        return cls(
            layer=max(layers),
            experts=max(experts),
            outside=parameters_of(model.model) * size - sum(layers),
            hidden=hidden,
            phi=phi,
            working=working,
            method=max((_method_bytes(step, model, method, tokens) for step in passes), default=0),
            logits=4 * min(HEAD_LOGITS, HEAD_TABLES * tokens * config.vocab_size) * asks_head,
            keep_phi=keep_phi,
            hidden_on_disk=hidden_on_disk,
            experts_on_disk=on_disk,
        )


def _method_bytes(step: Pass, model: MetaModel, method: Method, tokens: int) -> int:
    """Statistics and workspace of a pass beside the layer, of the layer that takes the most."""
    hidden, size, most = model.budget.hidden, model.dtype.itemsize, 0
    if step.kind == PassKind.TRIAL:
        most = trial_bytes(len(model.budget.layers), hidden)
    top_k = model.family.top_k(model.config)
    for pool in model.budget.layers.values():
        layer = LayerShape(pool, hidden, top_k, tokens, size)
        found = step.observer.nbytes(layer) if step.observer is not None else 0
        if step.kind == PassKind.COMPRESSED:
            found += method.apply_bytes(layer)
            if method.compensation is not None:
                dense = method.compensation.target == "dense"
                found += fit_bytes(tokens, hidden, pool.widths, size, dense)
        most = max(most, found)
    return most


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
