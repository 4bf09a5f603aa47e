"""Constants in the place of removed experts.

A removed expert e that a token chooses adds a_e(x) c_e instead of a_e(x) f_e(x): the router, and
its weights a, stay as they are. The constants of a layer's removed experts R minimise

    sum_t |sum_e a_te (f_e(x_t) - c_e)|^2 + ridge * M * sum_e |c_e - mean_e|^2

jointly over e in R, so that one makes up for another that is chosen with it. mean_e is the mean of
f_e over its own tokens, M the mean over R of sum_t a_te^2. Tokens held out judge what each of
`RIDGES` gains over the means. They are of the same text, and on another one a small ridge loses:
the largest is taken that gains the share `ENOUGH` of the most. Where none gains, the means stay.

Shapes: S = 2 parts of the tokens (fitted to, held out), E routed experts, R removed, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
ENOUGH = 0.5
UNJUDGED = 1.0  # the ridge where nothing is held out


def fitted_constants(
    removed: Sequence[int],
    mean_EH: torch.Tensor,
    gram_SEE: torch.Tensor,
    joint_SEEH: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """c of the experts `removed`, fp64 [R, H], and the ridge (0: the means are best).

    gram_SEE = sum of a_d a_e, joint_SEEH[s, d, e] = sum of a_d a_e f_e over the tokens of a part.
    """
    index_R = torch.tensor(removed, dtype=torch.int64)
    mean_RH = mean_EH[index_R]
    if not removed:
        return mean_RH, 0.0
    gram_SRR = gram_SEE[:, index_R][:, :, index_R]
    gram_SRR = (gram_SRR + gram_SRR.mT) / 2
    pull_SRH = joint_SEEH[:, index_R][:, :, index_R].sum(2, dtype=torch.float64)
    ridge = _best_ridge(mean_RH, gram_SRR, pull_SRH)
    if not ridge:
        return mean_RH, ridge
    return _solved(mean_RH, gram_SRR.sum(0), pull_SRH.sum(0), ridge), ridge


def _best_ridge(mean_RH: torch.Tensor, gram_SRR: torch.Tensor, pull_SRH: torch.Tensor) -> float:
    (gram_RR, out_RR), (pull_RH, out_RH) = gram_SRR, pull_SRH
    if not out_RR.any():
        return UNJUDGED

    def left(constants_RH: torch.Tensor) -> float:
        """What is left of the held-out output, less what it was."""
        return (constants_RH * (out_RR @ constants_RH - 2 * out_RH)).sum().item()

    by_means = left(mean_RH)
    gains = [by_means - left(_solved(mean_RH, gram_RR, pull_RH, ridge)) for ridge in RIDGES]
    enough = max(ENOUGH * max(gains), torch.finfo(torch.float64).tiny)
    return next((ridge for ridge, gain in zip(RIDGES, gains, strict=True) if gain >= enough), 0.0)


def _solved(
    mean_RH: torch.Tensor, gram_RR: torch.Tensor, pull_RH: torch.Tensor, ridge: float
) -> torch.Tensor:
    # where no token reached any of them, what holds them decides alone
    held = (ridge * gram_RR.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
    left_RR = gram_RR + held * torch.eye(len(gram_RR), dtype=gram_RR.dtype)
    factor_RR = torch.linalg.cholesky(left_RR)
    return torch.cholesky_solve(pull_RH + held * mean_RH, factor_RR)
