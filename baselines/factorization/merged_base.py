"""One base for all experts of a layer: their weighted mean, and which of its channels matter.

Shapes: E experts, M x N a projection's weight, H hidden, I width of an expert.
"""

from collections.abc import Sequence

import torch

EPSILON = 1e-12  # of the mean Fisher: decides only where a weight has none in any expert


def merged_base(
    weights_EMN: Sequence[torch.Tensor],
    fisher_EMN: torch.Tensor | None = None,
    counts_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """W_base = sum_e c_e F_e * W_e / sum_e c_e F_e, element by element, [M, N] in fp64.

    `fisher_EMN` is the diagonal Fisher F_e (or any multiple of it), `counts_E` how often each
    expert was selected, c_e; either may be absent, and then counts as 1. A weight that has no
    Fisher in any expert gets the mean by counts alone; counts that are all 0 count as 1.

    Source: D2-MoE (ICML 2025), equation 5; its code multiplies the counts in.
    """
    double = torch.float32 if weights_EMN[0].device.type == "mps" else torch.float64
    if counts_E is None or not counts_E.any():
        counts_E = torch.ones(len(weights_EMN))
    mean = 0.0
    if fisher_EMN is not None:
        mean = sum(float(f.mean(dtype=double)) for f in fisher_EMN) / len(fisher_EMN)
    total_MN = torch.zeros_like(weights_EMN[0], dtype=double)
    share_MN = torch.zeros_like(total_MN)
    for e, count in enumerate(counts_E.tolist()):
        if mean == 0:
            part_MN = torch.full_like(total_MN, count)
        else:
            part_MN = (fisher_EMN[e].to(double) / mean + EPSILON) * count
        share_MN += part_MN
        total_MN += part_MN * weights_EMN[e]
    return total_MN / share_MN


def kept_first(base_down_HI: torch.Tensor, gram_EII: torch.Tensor, keep: int) -> torch.Tensor:
    """The I intermediate channels with the `keep` that the base needs most in front, [I].

    Channel j counts |W_base[:, j]|_2 * |X_j|_2, where |X_j|_2 is its norm over the calibration
    tokens of all experts, from the Grams of the input of down. Ties break by index; each part
    stays in order. Source: D2-MoE, the static part of its base pruning.
    """
    norm_I = gram_EII.diagonal(dim1=1, dim2=2).sum(0).clamp_min(0).sqrt()
    score_I = base_down_HI.norm(dim=0) * norm_I.to(base_down_HI)
    order_I = torch.argsort(score_I, descending=True, stable=True)
    return torch.cat((order_I[:keep].sort().values, order_I[keep:].sort().values))
