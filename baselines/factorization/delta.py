"""Statistics of D2-MoE: Grams, counts and Fisher of a layer's routed experts, or their factors.

Shapes: N tokens of one expert, H hidden, E routed experts, I (in shared code W) width of an
expert, R rank, P the three projections gate, up, down, M x N one projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from baselines.factorization.layer_factors import Factoring, factored_layer
from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.statistics import LayerStatistics
from camera.moe.feed_forward import FeedForward
from camera.moe.gradients import GradientCall
from camera.moe.observer import ExpertCall
from camera.moe.pool import LayerShape, PoolIndex, sum_dtype


@dataclass
class DeltaStatistics(LayerStatistics):
    """A layer's experts, factored: the tensors of `DeltaExperts`, and how near they come.

    error_P = sqrt(sum_e |(W_e - W'_e) X_e|_F^2 / sum_e |W_e X_e|_F^2) of gate, up and down (fp64);
    tokens_E = tokens each expert of the pool saw (int64).
    """

    kind: ClassVar[str] = "delta"
    travels: ClassVar[bool] = False

    gate_up_proj: torch.Tensor
    gate_up_left: torch.Tensor
    gate_up_right: torch.Tensor
    down_proj: torch.Tensor
    down_left: torch.Tensor
    down_right: torch.Tensor
    gate_up_proj_bias: torch.Tensor  # both empty where experts have none
    down_proj_bias: torch.Tensor
    error_P: torch.Tensor
    tokens_E: torch.Tensor

    def factors(self) -> dict[str, torch.Tensor]:
        """The tensors of `DeltaExperts` by name."""
        tensors = {k: v for k, v in self.tensors().items() if k not in ("error_P", "tokens_E")}
        return {k: v for k, v in tensors.items() if v.numel() or not k.endswith("_bias")}


@dataclass
class DeltaSums(LayerStatistics):
    """Sums over calibration tokens that the factors of a layer are made of.

    gram_in_EHH = sum x x^T, gram_mid_EII = sum h h^T of every routed expert; gate_fisher_EIH,
    up_fisher_EIH, down_fisher_EHI = sums over samples of (dloss/dW_e)^2 (empty without gradients);
    tokens_E = tokens each expert of the pool saw (int64).
    """

    kind: ClassVar[str] = "delta_sums"
    travels: ClassVar[bool] = False
    reduced: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            "gram_in_EHH",
            "gram_mid_EII",
            "gate_fisher_EIH",
            "up_fisher_EIH",
            "down_fisher_EHI",
            "tokens_E",
        ),
        "sum",
    )

    gram_in_EHH: torch.Tensor
    gram_mid_EII: torch.Tensor
    gate_fisher_EIH: torch.Tensor
    up_fisher_EIH: torch.Tensor
    down_fisher_EHI: torch.Tensor
    tokens_E: torch.Tensor


@dataclass(frozen=True)
class DeltaSpec(ObserverSpec):
    """Sums of a layer, which are then factored at once: for all layers they would be too many."""

    statistics: ClassVar[type[DeltaStatistics]] = DeltaStatistics

    how: Factoring

    def single_process(self) -> str | None:
        return None  # the sums add up, before they are factored

    def nbytes(self, layer: LayerShape) -> int:
        """8 E (H^2 + I^2), one expert being factored, and all factors: no more than the layer."""
        widths, hidden = layer.routed_widths, layer.hidden
        grams = 8 * sum(hidden**2 + width**2 for width in widths)
        widest = max(widths, default=0)
        one = 8 * (4 * hidden**2 + 4 * widest**2 + 6 * hidden * widest)
        return grams + one + 3 * hidden * sum(widths) * layer.itemsize

    def host_bytes(self, layer: LayerShape) -> int:
        """The factors of gate, up and down, and those of gate and up put together."""
        widths, hidden = layer.routed_widths, layer.hidden
        deltas = self.how.rank * (len(widths) * hidden + sum(widths))
        return 5 * (deltas + hidden * max(widths, default=0)) * layer.itemsize

    def build(self, index: int, ffn: FeedForward) -> DeltaObserver:
        return DeltaObserver(ffn)

    def finish(self, seen: DeltaSums, ffn: FeedForward) -> DeltaStatistics:
        """The layer, factored, on the CPU and in the weights' precision."""
        fisher = (seen.gate_fisher_EIH, seen.up_fisher_EIH, seen.down_fisher_EHI)
        counts_E = seen.tokens_E[-len(ffn.routed.widths) :]
        grams = (seen.gram_in_EHH, seen.gram_mid_EII)
        tables = fisher if seen.gate_fisher_EIH.numel() else None
        tensors = factored_layer(ffn.routed, *grams, tables, counts_E, self.how)
        return DeltaStatistics(groups=seen.groups, **tensors, tokens_E=seen.tokens_E)


@dataclass(frozen=True)
class FisherDeltaSpec(DeltaSpec):
    """The same with gradients: F_e = sum over samples of (dloss/dW_e)^2, fp32.

    The mean over samples differs by a factor that cancels in the base.
    """

    reads: ClassVar[Literal["gradients"]] = "gradients"

    def nbytes(self, layer: LayerShape) -> int:
        """As without, and 12 E H I."""
        return super().nbytes(layer) + 12 * layer.hidden * sum(layer.routed_widths)

    def build(self, index: int, ffn: FeedForward) -> FisherObserver:
        return FisherObserver(ffn)


class DeltaObserver(LayerObserver):
    """Gathers a layer's selection counts and (fp64) Grams."""

    def __init__(self, ffn: FeedForward):
        self._index, self._group = PoolIndex(ffn), ffn.routed
        self._tokens_E = torch.zeros(self._index.experts, dtype=torch.int64)
        hidden, width = self._group.down(0).shape
        self._device = self._group.down(0).device
        double = sum_dtype(self._device)
        self._gram_in_EHH = self._table(hidden, hidden, double)
        self._gram_mid_EII = self._table(width, width, double)
        empty = torch.zeros(0, device=self._device)
        self._fisher: list[torch.Tensor] = [empty, empty, empty]  # of gate, up and down

    def __call__(self, call: ExpertCall) -> None:
        self._tokens_E[self._index.expert(call.group.path, call.expert)] += len(call.x_NH)
        if call.group.routed:
            pairs = ((self._gram_in_EHH, call.x_NH), (self._gram_mid_EII, call.h_NW))
            for gram_ENN, inputs in pairs:
                inputs = inputs.to(gram_ENN.dtype)
                gram_ENN[call.expert] += inputs.T @ inputs

    def result(self) -> DeltaSums:
        """The sums gathered so far, where the layer is."""
        grams = (self._gram_in_EHH, self._gram_mid_EII)
        return DeltaSums(self._index.groups, *grams, *self._fisher, self._tokens_E)

    def _table(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        experts = len(self._group.widths)
        return torch.zeros(experts, rows, columns, dtype=dtype, device=self._device)


class FisherObserver(DeltaObserver):
    """Gathers the gradients' squares too."""

    def __init__(self, ffn: FeedForward):
        super().__init__(ffn)
        hidden, width = self._group.down(0).shape
        shapes = (width, hidden), (width, hidden), (hidden, width)
        self._fisher = [self._table(*shape, torch.float32) for shape in shapes]

    def __call__(self, call: GradientCall) -> None:
        super().__call__(call)
        if call.group.routed:
            for gradients in call.weights():
                for fisher_EMN, gradient_MN in zip(self._fisher, gradients, strict=True):
                    fisher_EMN[call.expert].addcmul_(gradient_MN, gradient_MN)
