"""What a run holds on an accelerator: the moments that may be the peak, and the parts of each.

Shapes: T tokens of a batch, H hidden, K experts per token, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from camera.calibration.trials import TOKENS, trial_bytes
from camera.compensation.experts import fit_bytes
from camera.method import Method, Pass, PassKind
from camera.moe.grouped.products import FILLED_SHARE
from camera.moe.grouped.rows import BLOCK
from camera.moe.pool import LayerShape
from camera.pipeline.memory.moments import Moments
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
# Attention in fp32, where no fused kernel has it by piece: first queries, keys and values that are
# converted, scaled and repeated, then one of each beside the scores, before and after a softmax.
HEAD_TABLES, SCORES = 2.5, 2
ACTIVATIONS = 3  # of gates, ups, and their product, in fp32
RERUN = 4  # gate, up, their activation and their product, of what isn't kept
# Of a layer's graph, of which attention keeps its heads and probabilities in fp32: tables of hidden
# states, of its experts' inputs and outputs, of phi.
GRAPH_STATES, GRAPH_SLOTS, GRAPH_PHI, GRAPH_HEADS = 8, 3, 10, 2


@dataclass(frozen=True)
class DeviceMemory(Moments):
    layers: int
    outside: int
    hidden: int  # tables of hidden states that wait on the device
    phi: int  # of the widest layer, where it is kept
    attention: int
    observing: int  # an FFN expert by expert, and what is gathered of it
    applying: int  # what is gathered, and planning and applying
    finishing: int  # an FFN as a whole
    backward: int  # a layer's graph, and what is gathered of it
    trials: int  # their hidden states, and a batch
    logits: int

    @property
    def moments(self) -> dict[str, dict[str, int]]:
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
        if self.trials:
            found["trials"] = {"layers": self.layers, "hidden": self.trials}
        return found

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
        batch, backward, trials = min(tokens, BATCH_TOKENS), 0, 0
        table = batch * config.hidden_size * size
        shapes = [
            LayerShape(pool, model.budget.hidden, top_k, tokens, size, card)
            for pool in model.budget.layers.values()
        ]
        heads = config.num_attention_heads * model.family.attention_width(config)
        scores = config.num_attention_heads * length
        attention = attention_numbers(model) * size
        attention += 4 * int(max(HEAD_TABLES * heads, heads + SCORES * scores))
        routed = any(any(pool.routed) for pool in model.budget.layers.values())
        finishing = FFN_TABLES + SLOT_TABLES * top_k * routed * (not phi)
        rerun = RERUN * again * batch // max(tokens, 1)
        if PassKind.BACKWARD in kinds:
            slots = top_k * config.hidden_size * routed
            tables = GRAPH_STATES * config.hidden_size + GRAPH_SLOTS * slots
            graph = size * (tables + GRAPH_PHI * active_width(model))
            graph += 4 * (GRAPH_HEADS * heads + scores)
            backward = int(min(tokens, BACKWARD_TOKENS) * graph)
            backward += _most(passes, shapes, {PassKind.BACKWARD})
        if PassKind.TRIAL in kinds:
            trials = trial_bytes(len(model.budget.layers), model.budget.hidden, size) * bool(hidden)
            trials += min(tokens, TOKENS) * attention
        left = method.share_left(model.budget)
        seen = _most(passes, shapes, {PassKind.DENSE, PassKind.COMPRESSED, PassKind.WEIGHTS})
        # the last layer's outputs until they are written, and two tables of every batch but one
        waiting = 1 + (HIDDEN_HELD - 1) * max(0, 1 - batch / tokens) if tokens else 0
        return cls(
            layers=layers,
            outside=int(OUTSIDE_HELD * outside),
            hidden=int(waiting * hidden),
            phi=phi,
            attention=attention * batch,
            observing=seen + max(_ffn_bytes(shape, batch) for shape in shapes) * bool(batch),
            applying=seen + max(workspace(method, *at, left) for at in product(passes, shapes)),
            finishing=finishing * table + (rerun if phi else 0),
            backward=backward,
            trials=trials,
            logits=logits,
        )


def layers_bytes(model: MetaModel, method: Method, experts_on_disk: bool) -> int:
    """The layers that are held, of the largest; experts that stay on disk count once, and of the
    one that is written what is left of it; and what reading one takes."""
    size, most = model.dtype.itemsize, 0
    gone = 1 - method.share_left(model.budget)
    for index, layer in enumerate(model.layers):
        ffn = model.feed_forward(index)
        experts = ffn.routed.module_size if ffn.routed and experts_on_disk else 0
        pool = sum(model.budget.weights.get(group.path, 0) for group in ffn.groups)
        held = LAYERS_HELD * parameters_of(layer) - gone * pool
        most = max(most, held + (1 - LAYERS_HELD) * experts)
    return int(most * size) + model.unpacking


def _most(passes: Sequence[Pass], shapes: list[LayerShape], kinds: set[PassKind]) -> int:
    """What the observers of such passes hold of the layer that takes the most."""
    specs = [step.observer for step in passes if step.kind in kinds and step.observer is not None]
    return max((spec.nbytes(shape) for spec in specs for shape in shapes), default=0)


def workspace(method: Method, step: Pass, shape: LayerShape, left: float) -> int:
    """What stands beside what was gathered of a layer, between its last batch and its end: the
    result, planning, applying and a refit; `left` is the share of the layer that stays."""
    result = step.observer.result_bytes(shape) if step.observer is not None else 0
    if step.kind != PassKind.COMPRESSED:
        return result
    found = method.apply_bytes(shape)
    if method.compensation is not None:
        dense = method.compensation.dense_share > 0
        found += fit_bytes(
            shape.tokens, shape.hidden, shape.pool.widths, shape.itemsize, dense, left
        )
    return max(result, found)


def _ffn_bytes(shape: LayerShape, batch: int) -> int:
    """An FFN group by group: the routed experts' inputs, gate and up of all, and the activations of
    the group that has most. A batch's stay until the host waits in the next one, for where its
    routed rows begin: what isn't routed may come before."""
    pairs, routed = zip(shape.pool.widths, shape.pool.routed, strict=True), shape.routed_widths
    numbers = [batch * width for width, is_routed in pairs if not is_routed]
    gathered = 0
    if routed:
        rows = shape.top_k * batch + BLOCK // 2 * len(routed)  # blocks are filled up
        numbers.append(rows * max(routed))
        gathered = rows * shape.hidden * shape.itemsize
    most, alone = 4 * ACTIVATIONS * max(numbers), sum(numbers[: len(numbers) - bool(routed)])
    if routed:  # where a batched product is filled up
        most = max(most, int(FILLED_SHARE * (gathered + 2 * shape.itemsize * numbers[-1])))
    if routed and shape.tokens > batch:
        most = max(most, (2 * shape.itemsize + 4 * ACTIVATIONS) * alone)
    return gathered + 2 * shape.itemsize * sum(numbers) + most
