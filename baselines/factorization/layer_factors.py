"""Factors of a layer's routed experts: a merged base and low-rank deltas.

Shapes: H hidden, E routed experts, I width of an expert, B width of the base, R rank, P the three
projections gate, up, down, M x N one projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baselines.factorization.d2_moe import base_width
from baselines.factorization.low_rank import low_rank, output_energy, whitener
from baselines.factorization.merged_base import kept_first, merged_base
from camera.moe.experts.group import RoutedExperts

AXES = (0, 0, 1)  # of gate, up and down: where the intermediate channels lie


@dataclass(frozen=True)
class Factoring:
    """How a layer is factored: weights of the base (`merge`), pruned share of its intermediate
    channels, rank, damping of the Grams."""

    merge: str
    pp_ratio: float
    rank: int
    damping: float

    @property
    def by_counts(self) -> bool:
        """Whether selection counts weigh the base."""
        return self.merge in ("fisher_freq", "freq")


@torch.no_grad()
def factored_layer(
    group: RoutedExperts,
    gram_in_EHH: torch.Tensor,
    gram_mid_EII: torch.Tensor,
    fisher: Sequence[torch.Tensor] | None,
    counts_E: torch.Tensor,
    how: Factoring,
) -> dict[str, torch.Tensor]:
    """The tensors of `DeltaExperts` by name, and error_P, on the CPU and in the weights' dtype.

    `fisher` are the diagonal Fishers of gate, up and down of every expert.
    """
    experts = range(len(group.widths))
    gates, ups = zip(*(group.gate_up(e) for e in experts), strict=True)
    weights = gates, ups, tuple(group.down(e) for e in experts)
    counts_E = counts_E if how.by_counts else None
    bases = [
        merged_base(parts, table, counts_E)
        for parts, table in zip(weights, fisher or (None, None, None), strict=True)
    ]
    narrow = base_width(group.widths[0], how.pp_ratio)
    order_I = kept_first(bases[2], gram_mid_EII, narrow)
    grams = gram_in_EHH, gram_in_EHH, gram_mid_EII
    gate, up, down = (
        factored(*projection, order_I, narrow, how.damping, how.rank)
        for projection in zip(weights, bases, grams, AXES, strict=True)
    )
    errors = [part.error for part in (gate, up, down)]
    return {
        "gate_up_proj": torch.cat((gate.base, up.base)),
        "gate_up_left": torch.cat((gate.left_EMR, up.left_EMR), 1),
        "gate_up_right": torch.cat((gate.right_ERN, up.right_ERN), 1),
        "down_proj": down.base,
        "down_left": down.left_EMR,
        "down_right": down.right_ERN,
        **_biases(group, order_I),
        "error_P": torch.tensor(errors, dtype=torch.float64),
    }


def _biases(group: RoutedExperts, order_I: torch.Tensor) -> dict[str, torch.Tensor]:
    """Biases of the experts, those of gate and up in the order of their rows; empty: none."""
    both, downs = torch.empty(0), torch.empty(0)
    if group.layout.biased:
        experts = range(len(group.widths))
        both = torch.stack([group.gate_up_bias(e).view(2, -1) for e in experts])
        both = both[..., order_I.to(both.device)].flatten().cpu()
        downs = torch.stack([group.down_bias(e) for e in experts]).cpu()
    return {"gate_up_proj_bias": both, "down_proj_bias": downs}


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
    base_width: int,
    damping: float,
    rank: int,
) -> Factored:
    """Narrow the base to its first channels of `order_I` and factor every expert's difference.

    What the base lost is left to the deltas, which are taken from the narrowed and rounded base.
    The intermediate channels lie on `axis` of the weights (0 in gate and up, 1 in down).
    """
    dtype, double = weights_EMN[0].dtype, gram_ENN.dtype
    base = base_MN.index_select(axis, order_I[:base_width]).to(dtype)
    lefts, rights, lost, whole = [], [], 0.0, 0.0
    for weight_MN, gram_NN in zip(weights_EMN, gram_ENN, strict=True):
        if axis == 1:
            gram_NN = gram_NN[order_I][:, order_I]
        weight_MN = weight_MN.index_select(axis, order_I).to(double)
        delta_MN = weight_MN.clone()
        delta_MN.narrow(axis, 0, base_width).sub_(base)
        pair = low_rank(delta_MN, whitener(gram_NN, damping), rank)
        left_MR, right_RN = (factor.to(dtype) for factor in pair)
        rest_MN = delta_MN - left_MR.to(double) @ right_RN.to(double)
        lost += float(output_energy(rest_MN, gram_NN))
        whole += float(output_energy(weight_MN, gram_NN))
        lefts.append(left_MR.cpu())
        rights.append(right_RN.cpu())
    error = (lost / whole) ** 0.5 if whole else 0.0
    return Factored(base.cpu(), torch.stack(lefts), torch.stack(rights), error)
