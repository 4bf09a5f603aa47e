"""Refit of attention's output projection to the dense model's hidden states.

Errors of the pruned layers before stand in the hidden states; attention's output weights, which are
not pruned, can take back a part of them. The least squares are those of
`camera.compensation.least_squares`, with the attention heads as one expert and the hidden states of
the dense model after attention as the target.

Shapes: T calibration tokens, H hidden, A width of all heads together.
"""

from typing import Any

import torch
from torch import nn

from camera.compensation.expert_regression import ExpertRegression
from camera.compensation.experts import inverse_norms
from camera.compensation.least_squares import fit_report, refit
from camera.compensation.settings import CompensationSettings


@torch.no_grad()
def refit_attention(
    output: nn.Linear,
    heads_TA: torch.Tensor,
    missing_TH: torch.Tensor,
    aim_TH: torch.Tensor,
    fitted: int,
    how: CompensationSettings,
) -> dict[str, Any]:
    """Change the weights of `output`, which reads `heads_TA`, so that it also puts out what is
    missing of `aim_TH`, the dense model's hidden states; a report. Tokens from `fitted` on are held
    out; a bias stays as it is.
    """
    scale_T1 = inverse_norms(aim_TH) if how.token_weights == "relative" else None
    missing_TH = missing_TH.float() if scale_T1 is None else missing_TH.float() * scale_T1
    block = ExpertRegression(None, heads_TA, output.weight.T, scale_T1)
    found = refit([block], missing_TH, fitted, how, "attention")
    output.weight.copy_(block.weight_WH.T)
    return fit_report([found])
