"""Sums of what a layer's routed experts put out: the constants that replace some come from them.

Shapes: E routed experts of a layer, H hidden, N tokens of one expert, T tokens of a batch, S = 2
parts of all tokens: those that constants are fitted to, and those held out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.moe.pool import PoolIndex, sum_dtype
from camera.moe.routing import gates, routed

if TYPE_CHECKING:
    from camera.moe.feed_forward import FeedForward
    from camera.moe.observer import ExpertCall
    from camera.moe.pool import LayerShape

RUN, EVERY = 256, 8  # of so many runs of so many neighbouring tokens the last is held out
# Joint sums on the host: of this layer, of the one before until this one is seen, and what is taken
# from them for the experts that go.
JOINT_HELD = 2.75


@dataclass
class OutputSums(LayerStatistics):
    """Sums over the calibration tokens, f_e an expert's output and a_e its routing weight.

    Over the expert's own tokens gate_E = sum of a_e, output_EH = sum of f_e, square_EH = sum of
    f_e^2 (fp64). Where experts are fitted jointly, over all tokens of a part, a_e being 0 where e
    isn't chosen, gram_SEE = sum of a_d a_e (fp64) and joint_SEEH[s, d, e] = sum of a_d a_e f_e
    (fp32); else these are empty. tokens_E counts, over the whole pool (shared expert first).
    """

    kind: ClassVar[str] = "output_sums"
    travels: ClassVar[bool] = False
    reduced: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tokens_E", "gate_E", "output_EH", "square_EH", "gram_SEE", "joint_SEEH"), "sum"
    )
    tokens_E: torch.Tensor
    gate_E: torch.Tensor
    output_EH: torch.Tensor
    square_EH: torch.Tensor
    gram_SEE: torch.Tensor
    joint_SEEH: torch.Tensor

    @property
    def routed_tokens(self) -> torch.Tensor:
        """tokens_E of the routed experts alone."""
        return self.tokens_E[-len(self.gate_E) :]

    @property
    def mean_EH(self) -> torch.Tensor:
        """Mean output of every routed expert over its own tokens; 0 where it had none."""
        return self.output_EH / self.routed_tokens.clamp(min=1)[:, None]

    def stored(self) -> OutputSums:
        return replace(self, gram_SEE=self.gram_SEE[:0], joint_SEEH=self.joint_SEEH[:0])


@dataclass(frozen=True)
class OutputSumsSpec(ObserverSpec):
    """Sums of outputs; with `joint` those that constants are fitted to together."""

    statistics: ClassVar[type[OutputSums]] = OutputSums

    joint: bool = False

    def nbytes(self, layer: LayerShape) -> int:
        """H numbers of fp64 for the sum and the squares of each expert, and for each part of the
        tokens E^2 (H + 2) of fp32."""
        return 16 * sum(layer.pool.routed) * layer.hidden + self._joint_bytes(layer)

    def host_bytes(self, layer: LayerShape) -> int:
        """The result, of two layers for a moment, and what constants are fitted to."""
        sums = 16 * sum(layer.pool.routed) * layer.hidden
        return 2 * sums + int(JOINT_HELD * self._joint_bytes(layer))

    def _joint_bytes(self, layer: LayerShape) -> int:
        return 2 * 4 * sum(layer.pool.routed) ** 2 * (layer.hidden + 2) * self.joint

    def build(self, index: int, ffn: FeedForward) -> OutputSumsObserver:
        return OutputSumsObserver(ffn, self.joint)


class OutputSumsObserver(LayerObserver):
    """Gathers `OutputSums`."""

    def __init__(self, ffn: FeedForward, joint: bool):
        self._ffn, self._joint, self._index = ffn, joint, PoolIndex(ffn)
        self._tokens = [0] * self._index.experts
        group = ffn.routed
        experts, hidden = len(group.widths), group.down(0).shape[0]
        device = next(ffn.module.parameters()).device
        exact = dict(dtype=sum_dtype(device), device=device)
        self._gate_E = torch.zeros(experts, **exact)
        self._output_EH = torch.zeros(experts, hidden, **exact)
        self._square_EH = torch.zeros(experts, hidden, **exact)
        parts = 2 if joint else 0
        self._gram_SEE = torch.zeros(parts, experts, experts, **exact)
        self._joint_SEEH = torch.zeros(parts, experts, experts, hidden, device=device)
        self._starts, self._seen = {0: 0}, 0  # of each batch among all tokens

    def ffn_input(self, batch: int, x_TH: torch.Tensor, *_: Any) -> None:
        self._starts[batch] = self._seen
        self._seen += len(x_TH)

    @torch.no_grad()
    def __call__(self, call: ExpertCall) -> None:
        group, expert, x_NH, a_N = call.group, call.expert, call.x_NH, call.a_N
        self._tokens[self._index.expert(group.path, expert)] += len(x_NH)
        if not group.routed:
            return
        f_NH = group.project(expert, call.h_NW.to(x_NH.dtype)).float()
        exact = self._output_EH.dtype
        self._gate_E[expert] += a_N.sum(dtype=exact)
        exact_NH = f_NH.to(exact)  # squares of means are taken from those of outputs
        self._output_EH[expert] += exact_NH.sum(0)
        self._square_EH[expert] += exact_NH.square_().sum(0)
        if self._joint:
            _, weight_NK, index_NK = routed(self._ffn, x_NH)
            a_NE = gates(weight_NK, index_NK, len(group.widths))
            a_NE[:, expert] = a_N
            for part, part_N in enumerate(self._parts(call)):
                part_EN = (a_NE * part_N[:, None]).T
                self._gram_SEE[part, :, expert] += part_EN @ a_N
                self._joint_SEEH[part, :, expert] += part_EN @ (a_N[:, None] * f_NH)

    def _parts(self, call: ExpertCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of these tokens are fitted to, and which are held out."""
        place_N = call.tokens_N
        if place_N is None:
            place_N = torch.arange(len(call.x_NH), device=call.x_NH.device)
        held_N = (place_N + self._starts[call.batch]) // RUN % EVERY == EVERY - 1
        return ~held_N, held_N

    def result(self) -> OutputSums:
        """The sums so far, on the CPU."""
        exact = (self._gate_E, self._output_EH, self._square_EH, self._gram_SEE)
        sums = (tensor.cpu().double() for tensor in exact)
        tokens_E = torch.tensor(self._tokens)
        return OutputSums(self._index.groups, tokens_E, *sums, self._joint_SEEH.cpu())


@dataclass
class RankedOutputs(LayerStatistics):
    """What ranks a layer's experts, and the sums of their outputs, of one pass."""

    kind: ClassVar[str] = "ranked_outputs"
    ranking: LayerStatistics
    outputs: OutputSums

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {"ranking": self.ranking, "outputs": self.outputs}
        return {f"{k}.{name}": t for k, part in parts.items() for name, t in part.tensors().items()}

    def all_reduced(self) -> RankedOutputs:
        return replace(self, ranking=self.ranking.all_reduced(), outputs=self.outputs.all_reduced())

    def stored(self) -> LayerStatistics:
        return self.ranking.stored()


@dataclass(frozen=True)
class RankedOutputsSpec(ObserverSpec):
    """What `ranking` observes, and sums of outputs beside it."""

    statistics: ClassVar[type[RankedOutputs]] = RankedOutputs

    ranking: ObserverSpec
    outputs: OutputSumsSpec

    def nbytes(self, layer: LayerShape) -> int:
        return self.ranking.nbytes(layer) + self.outputs.nbytes(layer)

    def host_bytes(self, layer: LayerShape) -> int:
        return self.ranking.host_bytes(layer) + self.outputs.host_bytes(layer)

    def result_bytes(self, layer: LayerShape) -> int:
        return self.ranking.result_bytes(layer)

    def single_process(self) -> str | None:
        return self.ranking.single_process()

    def build(self, index: int, ffn: FeedForward) -> RankedOutputsObserver:
        return RankedOutputsObserver(self.ranking.build(index, ffn), self.outputs.build(index, ffn))


class RankedOutputsObserver(LayerObserver):
    """Shows all to two observers."""

    def __init__(self, ranking: LayerObserver, outputs: OutputSumsObserver):
        self._ranking, self._outputs = ranking, outputs
        self.reads_hidden = ranking.reads_hidden

    def ffn_input(self, *arguments: Any) -> None:
        self._ranking.ffn_input(*arguments)
        self._outputs.ffn_input(*arguments)

    def __call__(self, call: ExpertCall) -> None:
        self._ranking(call)
        self._outputs(call)

    def result(self) -> RankedOutputs:
        """What both say."""
        ranking = self._ranking.result()
        return RankedOutputs(ranking.groups, ranking, self._outputs.result())
