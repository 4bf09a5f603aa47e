"""The estimate of peak memory over all passes of a run."""

from dataclasses import dataclass

import psutil

from camera.runtime.progress import gigabytes
from camera.streaming.lm_head import HEAD_LOGITS, HEAD_TABLES
from camera.streaming.memory import (
    BACKWARD_TOKENS,
    BATCH_TOKENS,
    HIDDEN_HELD,
    HIDDEN_SHARE,
    _active_width,
    _parameters,
    _total,
)
from camera.streaming.settings import Memory
from camera.streaming.skeleton import Skeleton

PHI_LIMIT = 8 * 2**30  # bytes of phi of one layer that `phi=auto` keeps


LAYERS_HELD = 3  # one computed, one read ahead or converted, one cut or written behind


OUTSIDE_HELD = 1.5  # embeddings and head, and the one of them that is converted


# What computing a batch takes, in tables of its hidden states: its attention, or its experts' few
# tokens each; and, per expert of a token, when a whole FFN runs on it.
BATCH_TABLES = 8
SLOT_TABLES = 4
GRAPH_TABLES = 12  # of a layer's graph, of hidden states and of phi each


@dataclass(frozen=True)
class Needs:
    """What a run takes, in bytes, and what that decides."""

    layer: int  # the largest, as it is computed
    experts: int  # of the largest layer, routed
    outside: int  # embeddings, final norm, head
    hidden: int  # one table of hidden states
    phi: int  # of the widest layer
    working: int  # what computing one batch takes
    holds: int  # what the method has beside the layer: what it saw, and its work
    logits: int  # what the head puts out at a time, where the method asks it
    keep_phi: bool
    hidden_on_disk: bool
    visit: bool

    @property
    def peak(self) -> int:
        """What the run adds to the process at most.

        c1 * largest layer + c2 * hidden states + phi + what a batch or the method's work takes;
        where experts are visited, those that stay count once.
        """
        layers = LAYERS_HELD * self.layer
        if self.visit:
            layers += self.experts - LAYERS_HELD * self.experts
        tokens = 0 if self.hidden_on_disk else HIDDEN_HELD * self.hidden
        tokens += max(self.working, self.holds) + self.phi * self.keep_phi
        head = self.logits + HIDDEN_HELD * self.hidden if self.logits else 0
        return max(layers + tokens, int(OUTSIDE_HELD * self.outside) + head)

    def __str__(self) -> str:
        visited = ", its experts visited one by one" if self.visit else ""
        place = "on disk" if self.hidden_on_disk else "in memory"
        phi = "kept" if self.keep_phi else "computed again"
        work = f", the method's work {gigabytes(self.holds)}" if self.holds else ""
        return (
            f"about {gigabytes(self.peak)} beside the process itself (largest layer "
            f"{gigabytes(self.layer)}{visited}, hidden states {gigabytes(self.hidden)} {place}, "
            f"phi {gigabytes(self.phi)} {phi}, a batch {gigabytes(self.working)}{work})"
        )


def needs(
    skeleton: Skeleton,
    memory: Memory,
    tokens: int,
    slices: bool,
    holds: int = 0,
    backward: bool = False,
    asks_head: bool = False,
) -> Needs:
    """What a run over so many calibration tokens takes. Of the method: `slices` says that it only
    cuts layers, `holds` the bytes it has beside one (Method.holds), `backward` that it needs
    gradients, `asks_head` that it looks at next-token probabilities.

    What changes rounding (phi, experts) is decided by sizes alone, never by what is free now.
    """
    size, config = skeleton.dtype.itemsize, skeleton.config
    layers = [_parameters(layer) * size for layer in skeleton.layers]
    experts = [
        sum(group.module_size for group in skeleton.feed_forward(i).groups if group.routed) * size
        for i in range(len(layers))
    ]
    hidden = tokens * config.hidden_size * size
    width = _active_width(skeleton)
    phi = int(tokens * width * size)
    visit = memory.experts == "disk"
    if memory.experts == "auto":
        visit = LAYERS_HELD * max(layers) > _total(skeleton.device)
    visit = visit and max(experts) > 0 and not skeleton.compressed
    keep_phi = memory.phi == "keep" or (memory.phi == "auto" and phi <= PHI_LIMIT)
    keep_phi = keep_phi and slices and not visit and tokens > 0
    on_disk = memory.hidden == "disk"
    if memory.hidden == "auto":
        on_disk = HIDDEN_HELD * hidden > HIDDEN_SHARE * psutil.virtual_memory().available
    top_k = getattr(config, "num_experts_per_tok", 1) if max(experts) else 1
    tables = BATCH_TABLES if keep_phi else BATCH_TABLES + SLOT_TABLES * top_k
    working = min(tokens, BATCH_TOKENS) * config.hidden_size * size * tables
    if backward:
        graph = GRAPH_TABLES * (config.hidden_size + width) * size
        working = max(working, int(min(tokens, BACKWARD_TOKENS) * graph))
    return Needs(
        layer=max(layers),
        experts=max(experts),
        outside=_parameters(skeleton.model) * size - sum(layers),
        hidden=hidden,
        phi=phi,
        working=working,
        holds=holds,
        logits=4 * min(HEAD_LOGITS, HEAD_TABLES * tokens * config.vocab_size) * asks_head,
        keep_phi=keep_phi,
        hidden_on_disk=on_disk,
        visit=visit,
    )
