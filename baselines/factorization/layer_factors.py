"""One layer's routed experts as D2-MoE sees them: what is gathered, and how it becomes factors.

Shapes: N tokens of one expert, H hidden, E routed experts, I (in shared code W) width of an
expert, B width of the base, R rank, P the three projections gate, up, down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from baselines.factorization.low_rank import low_rank, output_energy, whitener
from baselines.factorization.merged_base import kept_first, merged_base
from camera.calibration.statistics import LayerStatistics
from camera.moe.feed_forward import ExpertGroup, FeedForward, RoutedExperts
from camera.moe.gradients import ExpertGradients

AXES = (0, 0, 1)  # of gate, up and down: where the intermediate channels lie


@dataclass
class LayerDelta(LayerStatistics):
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
    error_P: torch.Tensor
    tokens_E: torch.Tensor

    def factors(self) -> dict[str, torch.Tensor]:
        """The tensors of `DeltaExperts` by name."""
        return {k: v for k, v in self.tensors().items() if k not in ("error_P", "tokens_E")}


@dataclass(frozen=True)
class Factoring:
    """How a layer is factored: whether counts weigh the base, its width, rank, Grams' damping."""

    by_counts: bool
    base_width: int
    rank: int
    damping: float


class DeltaObserver:
    """Gathers a layer's selection counts and (fp64) Grams; its result is the layer, factored."""

    def __init__(self, ffn: FeedForward, how: Factoring):
        self._how, self._group = how, routed_group(ffn)
        self._groups = {group.path: list(group.widths) for group in ffn.groups}
        places = [(path, e) for path, widths in self._groups.items() for e in range(len(widths))]
        self._place = {place: i for i, place in enumerate(places)}
        self._tokens_E = torch.zeros(len(places), dtype=torch.int64)
        hidden, width = self._group.down(0).shape
        self._device = self._group.down(0).device
        double = torch.float32 if self._device.type == "mps" else torch.float64
        self._gram_in_EHH = self._table(hidden, hidden, double)
        self._gram_mid_EII = self._table(width, width, double)
        self._fisher: list[torch.Tensor | None] = [None, None, None]  # of gate, up and down

    def __call__(
        self,
        group: ExpertGroup,
        expert: int,
        x_NH: torch.Tensor,
        h_NW: torch.Tensor,
        a_N: torch.Tensor | None,
    ) -> None:
        self._tokens_E[self._place[group.path, expert]] += len(x_NH)
        if group.routed:
            for gram_ENN, inputs in ((self._gram_in_EHH, x_NH), (self._gram_mid_EII, h_NW)):
                inputs = inputs.to(gram_ENN.dtype)
                gram_ENN[expert] += inputs.T @ inputs

    @torch.no_grad()
    def result(self) -> LayerDelta:
        """The factored layer, on the CPU and in the weights' precision."""
        how, experts = self._how, range(len(self._group.widths))
        gates, ups = zip(*(self._group.gate_up(e) for e in experts), strict=True)
        weights = gates, ups, tuple(self._group.down(e) for e in experts)
        routed = [self._place[self._group.path, e] for e in experts]
        counts_E = self._tokens_E[routed] if how.by_counts else None
        bases = [
            merged_base(parts, fisher, counts_E)
            for parts, fisher in zip(weights, self._fisher, strict=True)
        ]
        order_I = kept_first(bases[2], self._gram_mid_EII, how.base_width)
        grams = self._gram_in_EHH, self._gram_in_EHH, self._gram_mid_EII
        gate, up, down = (
            factored(*projection, order_I, how)
            for projection in zip(weights, bases, grams, AXES, strict=True)
        )
        return LayerDelta(
            groups=self._groups,
            gate_up_proj=torch.cat((gate.base, up.base)),
            gate_up_left=torch.cat((gate.left_EMR, up.left_EMR), 1),
            gate_up_right=torch.cat((gate.right_ERN, up.right_ERN), 1),
            down_proj=down.base,
            down_left=down.left_EMR,
            down_right=down.right_ERN,
            error_P=torch.tensor([part.error for part in (gate, up, down)], dtype=torch.float64),
            tokens_E=self._tokens_E,
        )

    def _table(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        experts = len(self._group.widths)
        return torch.zeros(experts, rows, columns, dtype=dtype, device=self._device)


class FisherObserver(DeltaObserver):
    """Sees gradients too: F_e = sum over samples of (dloss/dW_e)^2, element by element, fp32.

    The mean over samples differs by a factor that cancels in the base.
    """

    def __init__(self, ffn: FeedForward, how: Factoring):
        super().__init__(ffn, how)
        hidden, width = self._group.down(0).shape
        shapes = (width, hidden), (width, hidden), (hidden, width)
        self._fisher = [self._table(*shape, torch.float32) for shape in shapes]

    def __call__(self, seen: ExpertGradients) -> None:
        super().__call__(seen.group, seen.expert, seen.x_NH, seen.h_NW, seen.a_N)
        if seen.group.routed:
            for gradients in seen.weights():
                for fisher_EMN, gradient_MN in zip(self._fisher, gradients, strict=True):
                    fisher_EMN[seen.expert].addcmul_(gradient_MN, gradient_MN)


@dataclass
class Factored:
    """One projection of all experts: W_e ~ base + left_e right_e, on the CPU.

    Rows (of down: columns) are in the order of the channels kept first, the base has only these.
    """

    base: torch.Tensor
    left_EMR: torch.Tensor
    right_ERN: torch.Tensor
    error: float


def factored(
    weights_EMN: Sequence[torch.Tensor],
    base_MN: torch.Tensor,
    gram_ENN: torch.Tensor,
    axis: int,
    order_I: torch.Tensor,
    how: Factoring,
) -> Factored:
    """Narrow the base to its first channels of `order_I` and factor every expert's difference.

    What the base lost is left to the deltas, which are taken from the narrowed and rounded base.
    The intermediate channels lie on `axis` of the weights (0 in gate and up, 1 in down).
    """
    dtype, double = weights_EMN[0].dtype, gram_ENN.dtype
    base = base_MN.index_select(axis, order_I[: how.base_width]).to(dtype)
    lefts, rights, lost, whole = [], [], 0.0, 0.0
    for weight_MN, gram_NN in zip(weights_EMN, gram_ENN, strict=True):
        if axis == 1:
            gram_NN = gram_NN[order_I][:, order_I]
        weight_MN = weight_MN.index_select(axis, order_I).to(double)
        delta_MN = weight_MN.clone()
        delta_MN.narrow(axis, 0, how.base_width).sub_(base)
        pair = low_rank(delta_MN, whitener(gram_NN, how.damping), how.rank)
        left_MR, right_RN = (factor.to(dtype) for factor in pair)
        rest_MN = delta_MN - left_MR.to(double) @ right_RN.to(double)
        lost += float(output_energy(rest_MN, gram_NN))
        whole += float(output_energy(weight_MN, gram_NN))
        lefts.append(left_MR.cpu())
        rights.append(right_RN.cpu())
    error = (lost / whole) ** 0.5 if whole else 0.0
    return Factored(base.cpu(), torch.stack(lefts), torch.stack(rights), error)


def routed_group(ffn: FeedForward) -> RoutedExperts:
    """The routed experts of a layer's pool."""
    return next(group for group in ffn.groups if group.routed)
