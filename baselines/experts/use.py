"""How tokens use a layer's routed experts.

Shapes: E routed experts of a layer, N tokens of one expert, H hidden, W width of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.moe.pool import PoolIndex, sum_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from camera.moe.feed_forward import FeedForward
    from camera.moe.observer import ExpertCall


@dataclass
class ExpertUse(LayerStatistics):
    """How a layer's routed experts were used by the tokens routed to them.

    gate_E = sum of g_e(x), norm_E = sum of ||f_e(x)||_2, gated_norm_E = sum of their product (all
    fp64), f_e the expert's output before its routing weight g_e; tokens_E counts, over the whole
    pool (shared expert first).
    """

    kind: ClassVar[str] = "expert_use"
    reduced: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tokens_E", "gate_E", "norm_E", "gated_norm_E"), "sum"
    )
    tokens_E: torch.Tensor
    gate_E: torch.Tensor
    norm_E: torch.Tensor
    gated_norm_E: torch.Tensor

    def routed_tokens(self) -> Tensor:
        """tokens_E of the routed experts alone."""
        return self.tokens_E[-len(self.gate_E) :]


@dataclass(frozen=True)
class UseSpec(ObserverSpec):
    """Use of experts; `softmax` takes g from all logits instead of the model's weights."""

    statistics: ClassVar[type[ExpertUse]] = ExpertUse

    softmax: bool = False

    def build(self, index: int, ffn: FeedForward) -> UseObserver:
        return UseObserver(ffn, self.softmax)


class UseObserver(LayerObserver):
    """Gathers `ExpertUse`."""

    def __init__(self, ffn: FeedForward, softmax: bool = False):
        import torch

        self.ffn, self.softmax, self._index = ffn, softmax, PoolIndex(ffn)
        self._tokens = [0] * self._index.experts
        device = next(ffn.module.parameters()).device
        experts = len(ffn.routed.widths)
        self._sums_3E = torch.zeros(3, experts, dtype=sum_dtype(device), device=device)

    def __call__(self, call: ExpertCall) -> None:
        import torch

        group, x_NH, a_N = call.group, call.x_NH, call.a_N
        self._tokens[self._index.expert(group.path, call.expert)] += len(x_NH)
        if not group.routed:
            return
        if self.softmax:
            from camera.moe.routing import routed

            logits_NE = routed(self.ffn, x_NH)[0]
            a_N = logits_NE.float().softmax(-1)[:, call.expert]
        norm_N = group.project(call.expert, call.h_NW.to(x_NH.dtype)).float().norm(dim=-1)
        found = torch.stack((a_N.float(), norm_N, a_N.float() * norm_N))
        self._sums_3E[:, call.expert] += found.to(self._sums_3E.dtype).sum(1)

    def result(self) -> ExpertUse:
        """The statistics gathered so far, on the CPU."""
        import torch

        tokens_E = torch.tensor(self._tokens)
        return ExpertUse(self._index.groups, tokens_E, *self._sums_3E.cpu().double())
