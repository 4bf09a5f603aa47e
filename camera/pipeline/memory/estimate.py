"""The estimate of peak memory over all passes of a run.

Shapes: T calibration tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from camera.calibration.trials import TOKENS, trial_bytes
from camera.method import Method, Pass, PassKind
from camera.moe.pool import LayerShape
from camera.pipeline.memory.device import (
    DEVICE_SHARE,
    LAYERS_HELD,
    OUTSIDE_HELD,
    DeviceMemory,
    layers_bytes,
    workspace,
)
from camera.pipeline.memory.host import HostMemory, hidden_held
from camera.runtime.device.accelerator import has_own_memory, total_memory
from camera.runtime.device.host_memory import free_host_memory
from camera.runtime.progress import format_bytes
from camera.streaming.hidden_states import HiddenPlace
from camera.streaming.lm_head import HEAD_LOGITS, HEAD_TABLES
from camera.streaming.memory import (
    BACKWARD_TOKENS,
    BATCH_TOKENS,
    HIDDEN_SHARE,
    active_width,
    attention_numbers,
    parameters_of,
)
from camera.streaming.settings import MemoryChoices
from camera.streaming.skeleton import MetaModel

PHI_LIMIT = 8 * 2**30  # bytes of phi of one layer that `phi=auto` keeps
# What computing a batch takes at least, in tables of its hidden states: its experts' few tokens
# each; and, per expert of a token, when a whole FFN runs on it.
BATCH_TABLES = 8
SLOT_TABLES = 4
PhiKept = Literal["all", "routed", "none"]
GRAPH_TABLES = 12  # of a layer's graph, of hidden states and of phi each


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a run, and the choices derived from them."""

    layer: int  # the largest, as it is computed
    experts: int  # of the largest layer, routed
    outside: int  # embeddings, final norm, head
    hidden: int  # one table of hidden states
    tables: int  # such tables that wait between layers
    phi: int  # of the widest layer
    phi_routed: int  # of its routed experts alone
    working: int  # what computing one batch takes
    method: int  # statistics and workspace of the method, beside the layer
    logits: int  # at a time, where a pass computes them
    unpacking: int  # what reading a tensor takes beside it, where the source is quantised
    phi_kept: PhiKept
    hidden_place: HiddenPlace
    experts_on_disk: bool
    device: DeviceMemory | None = None  # where the device has memory of its own
    host: HostMemory | None = None  # beside such a device

    @property
    def phi_held(self) -> int:
        """Bytes of phi that are kept."""
        return {"all": self.phi, "routed": self.phi_routed, "none": 0}[self.phi_kept]

    @property
    def hidden_on_disk(self) -> bool:
        """Whether hidden states wait on disk between layers."""
        return self.hidden_place == "disk"

    @property
    def host_peak(self) -> int:
        """What the run adds to the process at most."""
        return self.peak if self.host is None else self.host.peak

    @property
    def peak(self) -> int:
        """What the run adds at most: to the device, where that is the system's to the process.

        c1 * largest layer + c2 * hidden states + phi + what a batch or the method takes; experts
        that stay on disk count once.
        """
        if self.device is not None:
            return self.device.peak
        head = self.logits + self.tables * self.hidden if self.logits else 0
        in_layers = self.layers(LAYERS_HELD) + self.states + self.work + self.phi_held
        return max(in_layers, int(OUTSIDE_HELD * self.outside) + head)

    def layers(self, held: int) -> int:
        """Bytes of so many layers and of reading one; experts that stay on disk count once."""
        experts = (1 - held) * self.experts if self.experts_on_disk else 0
        return held * self.layer + experts + self.unpacking

    @property
    def states(self) -> int:
        """Hidden states in RAM, where the device's memory is the system's."""
        return self.tables * self.hidden if self.hidden_place == "ram" else 0

    @property
    def work(self) -> int:
        """Bytes of a batch or of the method."""
        return max(self.working, self.method)

    def __str__(self) -> str:
        experts = ", its experts on disk" if self.experts_on_disk else ""
        place = {"device": "on the device", "ram": "in memory", "disk": "on disk"}
        how = {"all": "kept", "routed": "kept of routed experts", "none": "recomputed"}
        phi = f"{format_bytes(self.phi)} {how[self.phi_kept]}"
        work = f", the method {format_bytes(self.method)}" if self.method else ""
        where = "on top of the process itself"
        if self.device is not None:
            where = f"on the device and {format_bytes(self.host_peak)} of the system's memory"
        return (
            f"about {format_bytes(self.peak)} {where} (largest layer "
            f"{format_bytes(self.layer)}{experts}, hidden states {format_bytes(self.hidden)} "
            f"{place[self.hidden_place]}, activations {phi}, a batch "
            f"{format_bytes(self.working)}{work})"
        )

    @classmethod
    def of(
        cls,
        model: MetaModel,
        method: Method,
        passes: Sequence[Pass],
        memory: MemoryChoices,
        tokens: int,
        length: int = 0,
        card: int | None = None,
        host: int | None = None,
    ) -> MemoryEstimate:
        """The estimate of these passes over so many calibration tokens, in samples of `length`.

        `card` is the memory of another accelerator than the model's, in bytes, `host` what is free
        in another system. What changes
        rounding (phi, experts) is decided by sizes alone, never by what is free now.
        """
        size, config = model.dtype.itemsize, model.text_config
        total = card or total_memory(model.device)
        layers = [parameters_of(layer) * size for layer in model.layers]
        routed = [model.feed_forward(i).routed for i in range(len(layers))]
        experts = [group.module_size * size if group else 0 for group in routed]
        hidden, width = tokens * config.hidden_size * size, active_width(model)
        phi = int(tokens * width * size)
        phi_routed = int(tokens * active_width(model, of_routed=True) * size)
        on_disk = memory.experts == "disk"
        if memory.experts == "auto":
            on_disk = LAYERS_HELD * max(layers) > total
        on_disk = on_disk and max(experts) > 0 and not model.compressed
        outside = parameters_of(model.model) * size - sum(layers)
        kinds = {step.kind for step in passes}
        reaching = {PassKind.BACKWARD: tokens, PassKind.TRIAL: min(tokens, TOKENS)}
        at_head = max((reaching.get(kind, 0) for kind in kinds), default=0)
        logits = 4 * min(HEAD_LOGITS, HEAD_TABLES * at_head * config.vocab_size)
        tables = hidden_held(method)
        apart = card is not None or has_own_memory(model.device)

        def on_device(there: int, kept: int) -> DeviceMemory:
            return DeviceMemory.of(
                *(model, method, passes, tokens, length),
                layers=layers_bytes(model, method, on_disk),
                outside=outside,
                hidden=there,
                phi=kept,
                again=phi - kept,
                logits=logits,
                card=total,
            )

        def fits(there: int, kept: int) -> bool:
            return on_device(there, kept).peak <= DEVICE_SHARE * total

        if apart and memory.experts == "auto" and method.compensation is None and not fits(0, 0):
            on_disk = max(experts) > 0 and not model.compressed
        serves = method.slices and not on_disk and tokens > 0
        hidden_place = memory.hidden
        if memory.hidden == "auto":
            free = free_host_memory() if host is None else host
            hidden_place = "disk" if tables * hidden > HIDDEN_SHARE * free else "ram"
            asked = "keep" if method.compensation is not None else memory.phi
            needed = serves * {"keep": phi, "routed": phi_routed}.get(asked, 0)
            if apart and not on_disk and fits(hidden, needed):
                hidden_place = "device"
        there = hidden * (apart and hidden_place == "device")
        sizes: dict[PhiKept, int] = {"all": phi, "routed": phi_routed, "none": 0}
        chosen: dict[str, PhiKept] = {"keep": "all", "routed": "routed", "recompute": "none"}
        if not serves:
            phi_kept: PhiKept = "none"
        elif memory.phi == "auto":
            having_room = (
                kept
                for kept, held in sizes.items()
                if held and (fits(there, held) if apart else held <= PHI_LIMIT)
            )
            phi_kept = next(having_room, "none")
        else:
            phi_kept = chosen[memory.phi]
        if not apart and hidden_place == "device":
            hidden_place = "ram"  # the device's memory is the system's
        top_k = model.family.top_k(config) if max(experts) else 1
        of_batch = BATCH_TABLES + SLOT_TABLES * top_k * (phi_kept == "none")
        numbers = config.hidden_size + max(
            attention_numbers(model), config.hidden_size * (of_batch - 1)
        )
        working = min(tokens, BATCH_TOKENS) * size * numbers
        if PassKind.BACKWARD in kinds:
            graph = GRAPH_TABLES * (config.hidden_size + width) * size
            working = max(working, int(min(tokens, BACKWARD_TOKENS) * graph))
        beside = HostMemory.of(
            *(model, method, passes, tokens, length), place=hidden_place, experts_on_disk=on_disk
        )
        return cls(
            layer=max(layers),
            experts=max(experts),
            outside=outside,
            hidden=hidden,
            tables=tables,
            phi=phi,
            phi_routed=phi_routed,
            working=working,
            method=max((_method_bytes(step, model, method, tokens) for step in passes), default=0),
            logits=logits,
            unpacking=model.unpacking,
            phi_kept=phi_kept,
            hidden_place=hidden_place,
            experts_on_disk=on_disk,
            device=on_device(there, sizes[phi_kept]) if apart else None,
            host=beside if apart else None,
        )


def _method_bytes(step: Pass, model: MetaModel, method: Method, tokens: int) -> int:
    """Statistics and workspace of a pass beside the layer, of the layer that takes the most."""
    hidden, size, most = model.budget.hidden, model.dtype.itemsize, 0
    if step.kind == PassKind.TRIAL:
        most = trial_bytes(len(model.budget.layers), hidden, size)
    top_k, left = model.family.top_k(model.text_config), method.share_left(model.budget)
    for pool in model.budget.layers.values():
        layer = LayerShape(pool, hidden, top_k, tokens, size)
        found = step.observer.nbytes(layer) if step.observer is not None else 0
        most = max(most, found + workspace(method, step, layer, left))
    return most
