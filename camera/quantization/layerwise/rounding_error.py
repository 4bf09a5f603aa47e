"""What rounding a layer's experts adds to the residual stream, at several numbers of bits.

Shapes: T tokens of a batch, N tokens of one expert, H hidden, W width of one expert, B numbers of
bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.moe.experts.activation import gated
from camera.moe.experts.group import ExpertGroup
from camera.moe.feed_forward import FeedForward
from camera.moe.observer import ExpertCall
from camera.moe.pool import LayerShape
from camera.quantization.quantizers.grids import CLIPS
from camera.quantization.quantizers.nearest import RoundToNearest


@dataclass
class RoundingErrorStatistics(LayerStatistics):
    """error_B = sum over tokens of sum_e |a (E(x) - E_b(x))|^2 / (|r|^2 + sum_e |a E(x)|^2).

    E_b is the expert rounded to b bits, a its routing weight (times the family's factor), r the
    residual stream that the layer's output is added to: the ratio is to what later layers read.
    Outputs and errors of a token's experts are taken as independent of each other. tokens_1 counts
    the tokens.
    """

    kind: ClassVar[str] = "rounding_error"
    reduced: ClassVar[dict[str, str]] = {"error_B": "sum", "tokens_1": "sum"}
    error_B: torch.Tensor
    tokens_1: torch.Tensor

    def relative(self) -> torch.Tensor:
        """The error as a mean over tokens, fp64 [B]."""
        return self.error_B / self.tokens_1.clamp(min=1)


@dataclass(frozen=True)
class RoundingErrorSpec(ObserverSpec):
    """Errors at `levels` bits; the others are settings of the grid that is rounded to."""

    statistics: ClassVar[type[RoundingErrorStatistics]] = RoundingErrorStatistics

    levels: tuple[int, ...]
    group_size: int | None
    sym: bool
    clip: str
    scale_dtype: str

    def nbytes(self, layer: LayerShape) -> int:
        """Every expert at each number of bits, and of each token its norm and errors."""
        rounded = 3 * layer.hidden * sum(layer.pool.widths) * layer.itemsize
        return len(self.levels) * rounded + 4 * layer.tokens * (1 + len(self.levels))

    def build(self, index: int, ffn: FeedForward) -> RoundingErrorObserver:
        return RoundingErrorObserver(ffn, self)


class RoundingErrorObserver(LayerObserver):
    """Runs every expert again with rounded weights, which are made when it is first reached."""

    reads_hidden = True

    def __init__(self, ffn: FeedForward, spec: RoundingErrorSpec):
        self._groups = {group.path: group.widths for group in ffn.groups}
        self._levels, self._scale2 = spec.levels, ffn.residual_scale**2
        self._nearest = RoundToNearest(
            group_size=spec.group_size,
            sym=spec.sym,
            clip=CLIPS[spec.clip],
            scale_dtype=getattr(torch, spec.scale_dtype),
        )
        self._rounded: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._norm2_T: dict[int, torch.Tensor] = {}  # by batch
        self._error_TB: dict[int, torch.Tensor] = {}
        self._tokens = 0

    def ffn_input(
        self,
        batch: int,
        x_TH: torch.Tensor,
        hidden_TH: torch.Tensor | None,
        mask_T: torch.Tensor | None,
    ) -> None:
        self._norm2_T[batch] = hidden_TH.float().square().sum(1)
        self._error_TB[batch] = self._norm2_T[batch].new_zeros(len(x_TH), len(self._levels))
        self._tokens += len(x_TH) if mask_T is None else int(mask_T.sum())

    def __call__(self, call: ExpertCall) -> None:
        group, expert = call.group, call.expert
        x_NH, bias, found = call.x_NH.float(), group.gate_up_bias(expert), []
        bias = None if bias is None else bias.float()
        y_NH = F.linear(call.h_NW.float(), group.down(expert).float())
        for gate_up, down in self._at_all_levels(group, expert):
            h_NW = gated(group.act_fn, *F.linear(x_NH, gate_up.float(), bias).chunk(2, 1))
            lost_NH = y_NH - F.linear(h_NW, down.float())
            found.append(lost_NH.square().sum(1))
        norm2_T, error_TB = self._norm2_T[call.batch], self._error_TB[call.batch]
        weight2_N = self._scale2 if call.a_N is None else self._scale2 * call.a_N.float().square()
        norm2_N = (y_NH.square().sum(1) * weight2_N).to(norm2_T.device)
        error_NB = (torch.stack(found) * weight2_N).T.to(norm2_T.device)
        tokens = slice(None) if call.tokens_N is None else call.tokens_N.to(norm2_T.device)
        norm2_T[tokens] += norm2_N  # a token reaches an expert once
        error_TB[tokens] += error_NB

    def result(self) -> RoundingErrorStatistics:
        """The statistics gathered so far."""
        error_B = torch.zeros(len(self._levels), dtype=torch.float64)
        for batch, error_TB in self._error_TB.items():
            norm2_T = self._norm2_T[batch].clamp(min=torch.finfo(torch.float32).tiny)
            error_B += (error_TB / norm2_T[:, None]).cpu().double().sum(0)
        tokens_1 = torch.tensor([self._tokens])
        return RoundingErrorStatistics(groups=self._groups, error_B=error_B, tokens_1=tokens_1)

    def _at_all_levels(
        self, group: ExpertGroup, expert: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Gate above up, and down, rounded to each number of bits, in the weights' precision."""
        if (group.path, expert) not in self._rounded:
            matrices = []
            for w_RC in (torch.cat(group.gate_up(expert)), group.down(expert)):
                row_bits = torch.repeat_interleave(torch.tensor(self._levels), len(w_RC))
                tried = w_RC.detach().float().repeat(len(self._levels), 1)[None]
                solved = self._nearest.solve(tried, row_bits=row_bits).weight[0]
                matrices.append(solved.to(w_RC.dtype).unflatten(0, (len(self._levels), len(w_RC))))
            self._rounded[group.path, expert] = list(zip(*matrices, strict=True))
        return self._rounded[group.path, expert]
