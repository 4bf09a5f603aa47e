"""Constants in the place of removed experts.

A removed expert e that a token chooses adds a_e(x) c_e instead of a_e(x) f_e(x): the router, and
its weights a, stay as they are. The constants of a layer's removed experts R minimise

    sum_t |sum_e a_te (f_e(x_t) - c_e)|^2 + ridge * sum_e |c_e - mean_e|^2

jointly over e in R, so that one makes up for another that is chosen with it. mean_e is the mean of
f_e over its own tokens, at which an expert of few tokens is held.

Shapes: E routed experts, R removed, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

RIDGE = 0.01  # of the mean over R of sum_t a_te^2


def fitted_constants(
    removed: Sequence[int],
    mean_EH: torch.Tensor,
    gram_EE: torch.Tensor,
    joint_EEH: torch.Tensor,
) -> torch.Tensor:
    """c of the experts `removed`, fp64 [R, H]; gram_EE = sum of a_d a_e, joint_EEH[d, e] = sum of
    a_d a_e f_e over all tokens."""
    index_R = torch.tensor(removed, dtype=torch.int64)
    mean_RH, gram_RR = mean_EH[index_R], gram_EE[index_R][:, index_R]
    if not removed:
        return mean_RH
    pull_RH = joint_EEH[index_R][:, index_R].sum(1, dtype=torch.float64)
    # where no token reached any of them, what holds them decides alone
    ridge = (RIDGE * gram_RR.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
    left_RR = (gram_RR + gram_RR.T) / 2 + ridge * torch.eye(len(removed), dtype=gram_RR.dtype)
    factor_RR = torch.linalg.cholesky(left_RR)
    return torch.cholesky_solve(pull_RH + ridge * mean_RH, factor_RR)
