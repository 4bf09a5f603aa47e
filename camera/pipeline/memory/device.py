"""What a run holds on an accelerator: the moments that may be the peak, and the parts of each.

Shapes: T tokens of a batch, H hidden, K experts per token, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from camera.calibration.trials import trial_bytes
from camera.compensation.experts import fit_bytes
from camera.method import Method, Pass, PassKind
from camera.moe.grouped.products import FILLED_SHARE
from camera.moe.grouped.rows import BLOCK
from camera.moe.pool import LayerShape
from camera.streaming.memory import (
    BACKWARD_TOKENS,
    BATCH_TOKENS,
    HIDDEN_HELD,
    active_width,
    attention_numbers,
    parameters_of,
)
from camera.streaming.skeleton import MetaModel

LAYERS_HELD = 3  # one computed, one read ahead, one compressed or being written
OUTSIDE_HELD = 1.5  # embeddings and head, and the one of them that is converted
DEVICE_SHARE = 0.9  # of the card's memory: the rest are its libraries and what lies between blocks
# What a whole FFN takes, in tables of a batch's hidden states; its experts' inputs and outputs are
# K tables each.
FFN_TABLES, SLOT_TABLES = 3, 5
SCORES = 4  # attention's scores in fp32, where no fused kernel has them by piece
ACTIVATIONS = 3  # of gates, ups, and their product, in fp32
RERUN = 4  # gate, up, their activation and their product, of what isn't kept
GRAPH_TABLES = 12  # of a layer's graph, of hidden states and of phi each


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of each part; a part that a run doesn't have is 0."""

    layers: int
    outside: int
    hidden: int  # tables of hidden states that wait on the device
    phi: int  # of the widest layer, where it is kept
    attention: int
    observing: int  # an FFN expert by expert, and what is gathered of it
    applying: int  # what is gathered, and planning and applying
    finishing: int  # an FFN as a whole
    backward: int  # a layer's graph, and what is gathered of it
    logits: int

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """The parts that stand in memory together, by what is done then."""
        held = {"layers": self.layers, "hidden": self.hidden}
        found = {
            "attention": {**held, "batch": self.attention},
            "observing": {**held, "phi": self.phi, "method": self.observing},
            "applying": {**held, "phi": self.phi, "method": self.applying},
            "finishing": {**held, "phi": self.phi, "batch": self.finishing},
            "outside": {"outside": self.outside, "logits": self.logits},
        }
        if self.backward:
            found["backward"] = {"layers": self.layers, "batch": self.backward}
        return found

    @property
    def peak(self) -> int:
        """The most that stands there together."""
        return max(sum(parts.values()) for parts in self.moments.values())

    @classmethod
    def of(
        cls,
        model: MetaModel,
        method: Method,
        passes: Sequence[Pass],
        tokens: int,
        length: int,
        *,
        layers: int,
        outside: int,
        hidden: int,
        phi: int,
        again: int,
        logits: int,
        card: int,
    ) -> DeviceMemory:
        """The parts of these passes; `hidden` and `phi` are what waits on the device, else 0.

        `again` is the phi that isn't kept, `card` the device's memory.
        """
        config, size = model.text_config, model.dtype.itemsize
        kinds = {step.kind for step in passes}
        top_k = model.family.top_k(config)
        batch, backward = min(tokens, BATCH_TOKENS), 0
        table = batch * config.hidden_size * size
        shapes = [
            LayerShape(pool, model.budget.hidden, top_k, tokens, size, card)
            for pool in model.budget.layers.values()
        ]
        scores = SCORES * 4 * config.num_attention_heads * length
        routed = any(any(pool.routed) for pool in model.budget.layers.values())
        finishing = FFN_TABLES + SLOT_TABLES * top_k * routed * (not phi)
        rerun = RERUN * again * batch // max(tokens, 1)
        if PassKind.BACKWARD in kinds:
            graph = GRAPH_TABLES * (config.hidden_size + active_width(model)) * size + scores
            backward = int(min(tokens, BACKWARD_TOKENS) * graph)
            backward += _most(passes, shapes, {PassKind.BACKWARD})
        if PassKind.TRIAL in kinds:
            hidden += trial_bytes(len(model.budget.layers), model.budget.hidden)
        seen = _most(passes, shapes, {PassKind.DENSE, PassKind.COMPRESSED, PassKind.WEIGHTS})
        # the last layer's outputs until they are written, and two tables of every batch but one
        waiting = 1 + (HIDDEN_HELD - 1) * max(0, 1 - batch / tokens) if tokens else 0
        return cls(
            layers=layers,
            outside=int(OUTSIDE_HELD * outside),
            hidden=int(waiting * hidden),
            phi=phi,
            attention=(attention_numbers(model) * size + scores) * batch * bool(tokens),
            observing=seen + max((_ffn_bytes(shape, batch) for shape in shapes), default=0),
            applying=seen + max((_applying(method, shape) for shape in shapes), default=0),
            finishing=finishing * table + (rerun if phi else 0),
            backward=backward,
            logits=logits,
        )


def layers_bytes(model: MetaModel, method: Method, experts_on_disk: bool) -> int:
    """The layers that are held, of the largest; experts that stay on disk count once, and what is
    pruned of the one that is written doesn't; and what reading one takes."""
    size, most = model.dtype.itemsize, 0
    pruned = getattr(method, "sparsity", None) or 0.0
    for index, layer in enumerate(model.layers):
        group = model.feed_forward(index).routed
        experts = group.module_size if group and experts_on_disk else 0
        held = (LAYERS_HELD - pruned) * parameters_of(layer)
        most = max(most, held + (1 - LAYERS_HELD) * experts)
    return int(most * size) + model.unpacking


def _most(passes: Sequence[Pass], shapes: list[LayerShape], kinds: set[PassKind]) -> int:
    """What the observers of such passes hold of the layer that takes the most."""
    specs = [step.observer for step in passes if step.kind in kinds and step.observer is not None]
    return max((spec.nbytes(shape) for spec in specs for shape in shapes), default=0)


def _applying(method: Method, shape: LayerShape) -> int:
    found = method.apply_bytes(shape)
    if method.compensation is not None:
        dense = method.compensation.target == "dense"
        widths = shape.pool.widths
        kept = 1 - (getattr(method, "sparsity", None) or 0.0)
        found += fit_bytes(shape.tokens, shape.hidden, widths, shape.itemsize, dense, kept)
    return found


def _ffn_bytes(shape: LayerShape, batch: int) -> int:
    """An FFN group by group: the routed experts' inputs, gate and up of all, which stay until the
    next batch, and the activations of the group that has most."""
    pairs, routed = zip(shape.pool.widths, shape.pool.routed, strict=True), shape.routed_widths
    numbers = [batch * width for width, is_routed in pairs if not is_routed]
    gathered = 0
    if routed:
        rows = shape.top_k * batch + BLOCK // 2 * len(routed)  # blocks are filled up
        numbers.append(rows * max(routed))
        gathered = rows * shape.hidden * shape.itemsize
    most = 4 * ACTIVATIONS * max(numbers)
    if routed:  # where a batched product is filled up
        most = max(most, int(FILLED_SHARE * (gathered + 2 * shape.itemsize * numbers[-1])))
    return gathered + 2 * shape.itemsize * sum(numbers) + most
