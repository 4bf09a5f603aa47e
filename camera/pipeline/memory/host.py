"""What a run holds of the system's memory beside an accelerator: the moments that may be the peak,
and the parts of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from camera.calibration.experts.super_experts import SAMPLED
from camera.calibration.trials import trial_bytes
from camera.method import Method, Pass, PassKind
from camera.moe.pool import LayerShape
from camera.pipeline.memory.moments import Moments
from camera.runtime.device.staging import STAGED
from camera.streaming.memory import BACKWARD_TOKENS, BATCH_TOKENS, HIDDEN_HELD
from camera.streaming.skeleton import MetaModel

# Tables of hidden states by target. Where the dense model's are asked for: its layer's inputs and
# the compressed one's, as they are recorded, the inputs of both FFNs and residuals, and an output;
# between, one model goes through the layer after the other.
TABLES = {"layer": HIDDEN_HELD, "between": 5, "dense": 7}
# Bytes of a micro-expert: of the layer its sums, energy, place in the order and bits; of all layers
# where they are ranked together.
RANKED, RANKED_TOGETHER = 96, 48
BUSIEST = 2  # times as many tokens as the mean expert has


@dataclass(frozen=True)
class HostMemory(Moments):
    staged: int  # pinned buffers that layers are read and written through
    ranking: int  # numbers of micro-experts
    hidden: int  # tables of hidden states that wait here
    routing: int  # of experts that stay on disk: inputs, places and outputs of all tokens
    kept: int  # what is seen of a layer and stays on the host
    sample: int  # of hidden states, for their median
    gradients: int  # of all tokens at a layer's output
    batch: int  # of them, as it is computed
    trials: int  # their hidden states

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        always = {"staged": self.staged, "method": self.ranking}
        seen = {**always, "method": self.ranking + self.kept}
        found = {
            "attention": {**always, "hidden": self.hidden, "sample": self.sample},
            "observing": {**seen, "hidden": self.hidden, "routing": self.routing},
        }
        if self.gradients:
            found["head"] = {**always, "gradients": self.gradients + self.batch}
            found["backward"] = {**seen, "gradients": self.gradients}
        if self.trials:
            found["trials"] = {**always, "hidden": self.trials}
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
        place: str,
        experts_on_disk: bool,
    ) -> HostMemory:
        """The parts of these passes, where hidden states wait at `place`."""
        size, hidden = model.dtype.itemsize, model.budget.hidden
        row, kinds = hidden * size, {step.kind for step in passes}
        pools, top_k = model.budget.layers.values(), model.family.top_k(model.text_config)
        shapes = [LayerShape(pool, hidden, top_k, tokens, size) for pool in pools]
        specs = [step.observer for step in passes if step.observer is not None]
        kept = max((spec.host_bytes(shape) for spec in specs for shape in shapes), default=0)
        numbers = [pool.micro_experts for pool in pools]
        together = method.slices and len(passes) > 1
        experts = max(sum(pool.routed) for pool in pools)
        finishes = any(step.feed == "dense" or step.kind == PassKind.DENSE for step in passes)
        routing = 0
        if experts_on_disk:
            busiest = min(tokens, int(BUSIEST * tokens * top_k / experts))
            routing = tokens * (row + top_k * (8 + size)) + busiest * row
            if finishes:  # outputs of all tokens; those of an expert, what they are added to, a sum
                routing += tokens * row * (place != "disk") + 2 * busiest * row
        in_ram, backward = place == "ram", PassKind.BACKWARD in kinds
        return cls(
            staged=2 * STAGED * (3 if experts_on_disk else 2),  # read ahead, written; an expert
            ranking=max(RANKED * max(numbers), RANKED_TOGETHER * sum(numbers) * together),
            hidden=in_ram * hidden_held(method) * _pinned(tokens, length, row),
            routing=routing,
            kept=kept,
            sample=2 * 4 * min(tokens, SAMPLED) * hidden * (place != "device"),  # twice in fp32
            gradients=tokens * row * backward,
            batch=min(tokens, BACKWARD_TOKENS) * row * backward,
            trials=in_ram * (PassKind.TRIAL in kinds) * trial_bytes(len(numbers), hidden, size),
        )


def hidden_held(method: Method) -> int:
    """Tables of hidden states that wait between layers, at most."""
    settings = method.compensation
    return TABLES[settings.target] if settings else HIDDEN_HELD


def _pinned(tokens: int, length: int, row: int) -> int:
    """A table of hidden states in pinned memory, each batch of a power of two of bytes."""
    batch = max(BATCH_TOKENS // length, 1) * length if length else BATCH_TOKENS
    parts = [batch * row] * (tokens // batch) + [tokens % batch * row]
    return sum(1 << (part - 1).bit_length() for part in parts if part)
